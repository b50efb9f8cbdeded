"""Rounds of drafts and reviews, and trajectories, each against a slow or a scripted way."""

import random

import pytest
import torch

import kvcomp
from kvcomp import thinking
from kvcomp.thinking import Reply, Rows, Sampling
from kvcomp.thinking.trajectory import signals
from thinking_rows import METHODS, WARM, prompt

pytestmark = pytest.mark.usefixtures("one_thread")


# --- rounds ---------------------------------------------------------------------------------------


def reply(text, prompt_tokens=10, tokens=5):
    return Reply(text, text, prompt_tokens, tokens)


def test_pdr_counts_both_budgets_and_keeps_the_workspace_small():
    calls = []

    def ask(prompts):
        calls.append(list(prompts))
        return [
            reply(f"\\boxed{{{len(calls)}}} " + "x " * 30, 10 * len(calls), 5 + place)
            for place, _ in enumerate(prompts)
        ]

    found = thinking.pdr(ask, "Q?", drafts=(4, 2, 1), workspace=6)
    assert [len(prompts) for prompts in calls] == [4, 1, 2, 1, 1]  # drafts, summary, ...
    assert found.answer == "5" and found.rows == 9
    assert found.sequential_tokens == 18 + 25 + 36 + 45 + 55
    assert found.total_tokens == sum([15, 16, 17, 18], 25) + 35 + 36 + 45 + 55
    carry = calls[2][0].split("wrong:\n")[1].split("\n\nSolve")[0]
    assert len(carry.split()) <= 6 and calls[0] == ["Q?"] * 4


def test_pdr_writers_choose_among_drafts():
    texts = ["\\boxed{1} a", "\\boxed{2} b", "\\boxed{2} c", "d"]
    asked = []

    def ask(prompts):
        asked.append(prompts)
        return [reply(text, 1, len(text) + (text[-1] == "b")) for text in texts[: len(prompts)]]

    thinking.pdr(ask, "Q?", drafts=(4, 1), writer="top", keep=2)
    assert "} c" in asked[-1][0] and "} b" in asked[-1][0] and "} a" not in asked[-1][0]
    asked.clear()
    thinking.pdr(ask, "Q?", drafts=(4, 4, 1), writer="random", keep=1, seed=1)
    assert len(set(asked[1])) > 1  # drawn anew for every next draft
    asked.clear()
    thinking.sr(ask, "Q?", rounds=3)
    assert [len(prompts) for prompts in asked] == [1, 1, 1] and "} a" in asked[1][0]


def test_dser_votes_where_repairs_are_likelier_than_slips():
    """A player that repairs with 0.3 and spoils with 0.1: three quarters of its votes are right."""
    rng = random.Random(0)

    def play(prompts):
        found = []
        for text in prompts:
            if "Write a better solution" in text:
                right = "Solution:\n\\boxed{7}" in text
                right = rng.random() < (0.9 if right else 0.3)
                found.append(reply("\\boxed{7}" if right else f"\\boxed{{{rng.randrange(7)}}}"))
            else:
                found.append(reply("\\boxed{0}"))
        return found

    found = thinking.dser(play, "Q?", chains=40, iterations=30, last=20)
    share = found.votes["7"] / sum(found.votes.values())
    assert found.answer == "7" and abs(share - 0.3 / (0.3 + 0.1)) < 0.08
    assert sum(found.votes.values()) == len(found.lengths) == 40 * 20
    assert found.total_tokens == 15 * 40 * 61 and found.sequential_tokens == 15 * 61


def test_ask_decodes_each_prompt_as_if_alone(model, words):
    """Ragged prompts in one batch; the same text several times is several draws."""
    texts = ["what so", "a much longer one so", "b"]
    with kvcomp.patch(model, kvcomp.Full()) as run:
        ask = thinking.Ask(run, words, temperature=0, max_new_tokens=12)
        together = ask(texts)
        assert [each.text for each in together] == [ask([text])[0].text for text in texts]
        draws = thinking.Ask(run, words, max_new_tokens=12, **WARM)
        assert len({each.text for each in draws(["so"] * 4)}) == 4
        assert draws(["so"])[0].text != draws(["so"])[0].text
    sizes = [len(words(f"<bos>{text}<think>")["input_ids"]) for text in texts]
    assert [each.prompt_tokens for each in together] == sizes


def test_solutions_are_what_stands_behind_the_thought(model, words):
    first = [thinking.BudgetForcing(words, 5, budget=3)]
    with kvcomp.patch(model, kvcomp.Full()) as run:
        ask = thinking.Ask(run, words, max_new_tokens=9, processors=first, **WARM)
        (found,) = ask(["abc"])
    assert found.text.count("</think>") == 1
    assert found.solution == found.text.partition("</think>")[2].strip() and found.tokens == 9


@pytest.mark.parametrize("name", ["full", "lazy", "delethink"])
def test_rounds_of_a_model(model, words, name):
    with kvcomp.patch(model, METHODS[name]) as run:
        ask = thinking.Ask(run, words, max_new_tokens=20, seed=3, **WARM)
        pdr = thinking.pdr(ask, "so what", drafts=(3, 1), workspace=16)
        dser = thinking.dser(ask, "so what", chains=2, iterations=2, last=1)
        assert ask.calls == 3 + 5
    assert pdr.total_tokens > pdr.sequential_tokens > 60 and dser.rows == 10


def test_rounds_hold_a_prompt_a_workspace_and_one_draft(model, words):
    """However many rounds there are."""
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for rounds in (2, 4):
        with kvcomp.patch(model, kvcomp.Full()) as run:
            ask = thinking.Ask(run, words, chat=False, max_new_tokens=30, **WARM)
            again = "{question}{carry}"
            found = thinking.sr(ask, "so what", rounds=rounds, workspace=10, again=again)
            held = run.report().kv_bytes_peak / per_token
        most = len(words("so what")["input_ids"]) + 10 + 30
        assert most // 2 < held <= most < found.total_tokens


# --- trajectories ---------------------------------------------------------------------------------


def test_signals_of_a_known_path():
    """Right, right, up: |d| = sqrt 5 over 3 moves of length 1."""
    path = torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1]])[:, None, None]
    found = signals(path)
    assert found["net"].item() == pytest.approx(5**0.5 / 3)
    assert found["cumulative"].item() == pytest.approx(3)
    assert found["aligned"].item() == pytest.approx((2 + 2 + 1) / 5**0.5 / 3)
    assert signals(path[:1])["net"].isnan().all()


def test_a_trajectory_is_that_of_a_second_forward(model):
    with kvcomp.patch(model, kvcomp.Full()) as run:
        with thinking.LatentTrajectory(run, block=7) as heard:
            sampling = Sampling(**WARM, max_new_tokens=25)
            rows = Rows(run, prompt(), sampling, copies=3, followers=[heard], eos=[])
            while len(rows.all[2].ids) < 25:
                if len(rows.all[2].ids) == 10:
                    rows.keep([rows.all[0], rows.all[2]])
                rows.step()
                if len(rows.all[2].ids) == 24:
                    online = heard.signals()
        assert heard.tokens == 24
    for place, number in enumerate((0, 2)):
        text = torch.cat([prompt()["input_ids"], torch.tensor([rows.all[number].ids[:23]])], 1)
        with torch.no_grad():
            states = model(text, output_hidden_states=True).hidden_states
        layers = [*states[1:-1], last_layer(model, text)]
        blocks = [torch.stack([x[0, 20:] for x in layers]).split(7, 1)]
        means = torch.stack([each.mean(1) for each in blocks[0]])[:, :, None]
        wanted = signals(means)
        for name, value in wanted.items():
            torch.testing.assert_close(online[name][place], value[0], rtol=1e-4, atol=1e-5)


def last_layer(model, text):
    """Its output, before the norm that `output_hidden_states` shows it behind."""
    found = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, given, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(text)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("signal", ["cumulative", "aligned", "length"])
def test_latent_trajectory_goes_on_with_the_best(model, words, signal):
    hooks = dict(model.model.layers[0]._forward_hooks)  # transformers leaves some of its own
    with kvcomp.patch(model, kvcomp.LazyEviction.example(32)) as run:
        found = thinking.latent_trajectory(
            run, words, prompt(), k=5, keep=2, at=18, block=8, signal=signal,
            answer_of=lambda text: text[-1:], max_new_tokens=40, **WARM,
        )  # fmt: skip
    assert found.total_tokens == 20 + 3 * 18 + 2 * 40 and len(found.lengths) == 2
    assert model.model.layers[0]._forward_hooks == hooks
