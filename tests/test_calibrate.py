"""`calibrate` finds what the method needs to know of a model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from hf_batches import generate
from kvcomp import Delta, Full, LazyEviction, LouisKV, reasoner
from kvcomp.hf import answer_loss, decode_all
from kvcomp.hf.calibrate import better
from kvcomp.hf.decode import answer_losses
from kvcomp.hf.recorders import PageRecorder
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=6)


def test_calibrate_finds_the_layer_that_points_and_the_one_that_reads():
    """The reasoner's layer 2 points at the facts and layer 5 reads them: one serves the other."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    prompts = [reasoner.task.make_problem(nodes=24, steps=60, seed=seed).prompt for seed in (1, 2)]
    method = Delta(budget=64, page_size=4, recent=2)
    recorder = PageRecorder(method, every=10)
    decode_all(model, prompts, recorder, tokenizer=tokenizer, max_new_tokens=120)
    recall = torch.stack(recorder.recalls).mean(0)
    assert torch.allclose(recall.diagonal(), torch.ones(8))
    assert recall[:5, 5].argmax() == 2
    assert recall[2, 5] > recall[[0, 1, 3, 4], 5].max() + 0.1


def test_calibrate_returns_a_delta_that_fits(llama):
    prompts = [list(range(3, 60)), list(range(90, 20, -1))]
    found = Delta.calibrate(
        llama, prompts, num_delta=2, max_new_tokens=20, every=5, budget=16, page_size=4, recent=2
    )
    assert found.delta_layers[0] == found.num_warmup(6) == 1
    assert len(found.delta_layers) == 2
    found.check(6)


def test_calibrate_finds_the_hits_that_matter_to_lazy_eviction():
    """On the reasoner, whose idle heads spread thin, a low alpha calls every token important."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    problem = reasoner.task.make_problem(nodes=32, steps=70, seed=1, live=4)
    found = LazyEviction.calibrate(
        model,
        [problem.prompt],
        tokenizer=tokenizer,
        max_new_tokens=280,
        budget=96,
        alphas=(1e-4, 0.2),
    )
    assert found.alpha in (None, 0.2)  # None is 1 / budget, which is tried beside them
    assert found == LazyEviction(budget=96, window=found.window, alpha=found.alpha)
    assert 1 <= found.window <= 24
    given = torch.tensor(tokenizer(problem.gold())["input_ids"])[-280:]
    low, high = (
        answer_loss(model, [problem.prompt], [given], method, tokenizer=tokenizer)
        for method in (LazyEviction(budget=96, window=24, alpha=1e-4), found)
    )
    dense = answer_loss(model, [problem.prompt], [given], Full(), tokenizer=tokenizer)
    assert dense < high < low


def test_calibrate_keeps_the_default_unless_another_is_clearly_better():
    default, lucky, good = (LazyEviction(budget=32, window=w) for w in (8, 4, 2))
    noise = torch.randn(64 * 24, generator=torch.Generator().manual_seed(0))
    even = (torch.arange(len(noise)) // 64 % 2 == 0).float()
    losses = {default: 2 + noise, lucky: 2 + noise - 0.5 * even, good: 1.9 + noise}
    assert better(default, [default], lambda method: [losses[method]]) == default
    assert better(default, [lucky], lambda method: [losses[method]]) == default  # not confirmed
    assert better(default, [good], lambda method: list(losses[method].split(500))) == good
    losses[good] = 1.99 + noise.flip(0)  # no more than chance explains
    assert better(default, [good], lambda method: [losses[method]]) == default


def test_calibrations_read_given_answers(llama):
    prompts = [list(range(3, 30)), list(range(90, 63, -1)), [5, 6, 7]]
    answers = [torch.arange(40, 70), torch.arange(20, 50), torch.arange(99, 59, -1)]
    fields = {"budget": 16, "window": 4}
    found = answer_losses(llama, prompts, answers, LazyEviction(**fields))
    single = [
        answer_loss(llama, [prompt], [answer], LazyEviction(**fields))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert torch.allclose(torch.stack([x.mean() for x in found]), torch.tensor(single), atol=1e-4)
    pages = {"budget": 16, "page_size": 4, "recent": 2, "num_delta": 1, "every": 5}
    assert Delta.calibrate(llama, prompts, answers=answers, **pages).delta_layers == (1,)
    lazy = LazyEviction.calibrate(llama, prompts, answers=answers, alphas=(0.05,), budget=16)
    assert lazy.budget == 16 and lazy.window <= 4
    tau = LouisKV.calibrate(llama, prompts, answers=answers, budget=16, local=4, sinks=1).tau
    assert -1 <= tau <= 1


def test_calibrate_finds_the_similarity_below_which_a_share_of_the_steps_lies(llama):
    prompts = [list(range(3, 60)), list(range(90, 20, -1))]
    fields = {"budget": 200, "sinks": 4, "local": 16, "segment": (1, 1000), "dense_layers": 1}
    found = LouisKV.calibrate(llama, prompts, rate=0.3, max_new_tokens=30, **fields)
    assert found == LouisKV(tau=found.tau, **fields)
    with kvcomp.patch(llama, found) as run:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            generate(llama, batch, max_new_tokens=30)
    steps = 2 * (30 - 2) * 5  # an answer's first step has nothing to compare with
    retrievals = int(sum(run.meter.retrievals)) - 2 * 5
    assert retrievals / steps == pytest.approx(0.3, abs=0.03)


def test_what_cannot_be_read_is_said(llama):
    with pytest.raises(ValueError, match=r"prompts: expected at least one token in each"):
        Delta.calibrate(llama, [[]], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"answers: expected one for each of the 2 prompts, got 1"):
        Delta.calibrate(llama, [[3, 4], [5]], answers=[[6, 7]])
