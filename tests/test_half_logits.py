"""Logits in 16 bits: what they hold, who takes them, and that a method chooses by them as well."""

import math

import pytest
import torch

import kvcomp
from kvcomp import ops, reasoner
from kvcomp.cache import kv_cache, static
from kvcomp.ops import OPS
from kvcomp.ops.decode_attention import logits_dtype
from kvcomp.selftest.case import attention_inputs, ints

NAMES = [name for name in OPS["decode_attention"].impls if name not in ("cpu", "cuda")]


def attend(name, scale, dtype, kept_in):
    q, k, v = attention_inputs(2, 6, 2, 70, 64, dtype)
    logits = torch.full((2, 6, 72), math.nan, dtype=kept_in)
    out, lse = OPS["decode_attention"].impl(name)(q, k, v, ints([70, 33]), None, 1, scale, logits)
    return out, lse, logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_they_err_as_documented_and_change_nothing_else(name, dtype, poisoned_outputs):
    for scale in (0.01, 0.125, 40.0, 1e6):
        *want, exact = attend(name, scale, dtype, torch.float32)
        *got, half = attend(name, scale, dtype, torch.float16)
        assert all(map(torch.equal, got, want))
        for row, length in enumerate((70, 33)):
            exact_row, half_row = exact[row, :, :length], half[row, :, :length].float()
            inside = exact_row.clamp(-65504, 65504)
            above = torch.frexp(inside).exponent  # |x| < 2 ** above
            bound = torch.exp2((above.clamp(min=-13) - 12).float())
            assert ((half_row - inside).abs() <= bound).all()
            if scale == 1e6:
                assert (exact_row.abs() > 65504).any() and (half_row.abs() == 65504).any()


def test_the_cpu_says_that_it_does_not_take_them():
    q, k, v = attention_inputs(1, 4, 2, 8, 32, torch.float32)
    lens, half = ints([8]), torch.zeros(1, 4, 8, dtype=torch.float16)
    hits, lse = torch.zeros(1, 2, 1, dtype=torch.int32), torch.zeros(1, 4)
    for call in (
        lambda: ops.decode_attention(q, k, v, lens, logits=half),
        lambda: ops.attend_and_select(q, k, v, lens, 4, 1, logits=half),
        lambda: ops.page_scores(half, lse, lens, 4),
        lambda: ops.attention_hits(half, lse, lens, hits, 0.1),
    ):
        with pytest.raises(TypeError, match="'logits': expected float32, got float16"):
            call()


def test_caches_keep_them_on_a_gpu_only():
    class Gpu:
        is_cuda, dtype = True, torch.bfloat16

    assert logits_dtype(Gpu()) == torch.float16
    assert logits_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    Gpu.dtype = torch.float32
    assert logits_dtype(Gpu()) == torch.float32


@pytest.fixture(scope="module")
def problem():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(reasoner.path())
    model = transformers.AutoModelForCausalLM.from_pretrained(reasoner.path()).eval()
    problem = reasoner.task.make_problem(nodes=16, steps=24, seed=0)
    return model, problem, tokenizer(problem.prompt, return_tensors="pt"), tokenizer


@pytest.mark.usefixtures("one_thread")
def test_delta_chooses_the_same_pages(problem, monkeypatch):
    """What a GPU does, by the references: nearly all sets are equal, and the walk is right."""
    model, task, inputs, tokenizer = problem
    same = []

    def in_both(q, k, v, seq_lens, page_size, num_pages, *, logits, **scaled):
        forced = {name: scaled.pop(name) for name in ("num_recent", "num_sink")}
        assert (
            logits.dtype == torch.float16
            and scaled.keys() == {"scale", "words", "softcap"}
            and scaled["words"] is scaled["softcap"] is None
        )
        reference = OPS["attend_and_select"].impl("reference")
        rest = 1, True, *forced.values()
        start = q, k, v, seq_lens, None, page_size, num_pages, scaled["scale"]
        *_, exact, _ = reference(*start, logits.float(), *rest)
        # As kernels do it: the scores are those of the rounded logits.
        out, lse = OPS["decode_attention"].impl("reference")(
            q, k, v, seq_lens, None, 1, scaled["scale"], logits
        )
        scores = OPS["page_scores"].impl("reference")(
            logits[:, :, : k.shape[2]], lse, seq_lens, page_size, 1, True
        )
        chosen = ops.select_pages(scores, seq_lens, page_size, num_pages, **forced)
        same.append(torch.equal(chosen[0], exact))
        return out, lse, scores, *chosen

    monkeypatch.setattr(kv_cache, "logits_dtype", lambda q: torch.float16)
    monkeypatch.setattr(ops, "attend_and_select", in_both)
    method = kvcomp.Delta(budget=64, page_size=4, recent=2, delta_layers=(2,))
    with kvcomp.patch(model, method) as run:
        output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert reasoner.task.grade(task, answer).final_correct
    assert len(same) > 100 and sum(same) >= 0.97 * len(same)
    slots = run.report().kv_bytes_allocated // (8 * 2 * 2 * 64 * 2)
    assert run.report().logits_bytes_allocated == 2 * model.config.num_attention_heads * slots


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("max_tokens", [None, 300])
def test_the_report_has_the_buffer(problem, max_tokens):
    model, _, inputs, _ = problem
    rows, heads = 1, model.config.num_attention_heads
    for method, looks in (
        (kvcomp.Delta(budget=64, page_size=4, recent=2), True),
        (kvcomp.LazyEviction(budget=128, window=16), True),
        (kvcomp.Full(), False),
    ):
        with kvcomp.patch(model, method, max_tokens=max_tokens) as run:
            model.generate(**inputs, max_new_tokens=40, do_sample=False)
        report = run.report()
        slots = report.kv_bytes_allocated // (8 * 2 * 2 * 64 * 2)
        assert report.logits_bytes_allocated == (4 * rows * heads * slots if looks else 0)


def test_both_caches_ask_in_one_place():
    assert kv_cache.logits_dtype is static.logits_dtype is logits_dtype
