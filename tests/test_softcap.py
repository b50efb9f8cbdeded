"""Soft caps on the logits (Gemma 2), beyond the cases of the op test and the matrix of models."""

import functools
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import every_model
import kvcomp
from kvcomp import Delta, Full, LazyEviction, ops
from kvcomp.selftest.case import Case, attention_inputs, ints, on
from kvcomp.selftest.code_cases import codes_of
from kvcomp.selftest.compare import check

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0


@functools.cache
def gemma2():
    return every_model.tiny(AutoModelForCausalLM, "gemma2", attn_logit_softcapping=1.5)


def generate(**options):
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 4096, **options}
    return gemma2().generate(input_ids=IDS, attention_mask=MASK, **given)


def test_logits_and_lse_are_capped():
    q, k, v = attention_inputs(1, 4, 2, 70, 64, torch.float32)
    plain, capped = torch.zeros(1, 4, 70), torch.zeros(1, 4, 70)
    ops.decode_attention(q * 9, k, v, ints([70]), logits=plain)
    out, lse = ops.decode_attention(q * 9, k, v, ints([70]), logits=capped, softcap=5.0)
    assert plain.abs().max() > 15, "the cap is not felt"
    torch.testing.assert_close(capped, 5 * (plain / 5).tanh(), rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, capped.logsumexp(-1))
    probs = capped.softmax(-1).view(1, 2, 2, 70)
    torch.testing.assert_close(out, (probs @ v).view(1, 4, 64))


def test_what_is_out_of_range_stays_so():
    q, k, v = attention_inputs(1, 4, 2, 70, 64, torch.float32)
    logits = torch.zeros(1, 4, 70)
    k[0, 0, 3], k[0, 0, 5] = 1e30, -1e30
    ops.decode_attention(q, k, v, ints([70]), logits=logits, softcap=5.0)
    assert logits.abs().max() <= 5
    k[0, 0, 3] = torch.nan
    _, lse = ops.decode_attention(q, k, v, ints([70]), logits=logits, softcap=5.0)
    assert logits[0, :2, 3].isnan().all()
    assert lse[0, :2].isnan().all()
    assert not lse[0, 2:].isnan().any()


@pytest.mark.parametrize("name", ["cpu", "cuda-host", "triton"])
def test_codes_are_capped_too(name):
    """Behind the scales of K and before those of V."""
    if name not in ops.OPS["decode_attention"].impls:
        pytest.skip(f"no {name} here")
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"

    def make(dtype, device):
        q, k, v = attention_inputs(2, 4, 2, 70, 64, dtype)
        *coded, words = codes_of(k, v)
        return on(
            device, q * 9, *coded, ints([70, 33]), None, 1, 0.125, None, words, None, None, 5.0
        )

    def append(dtype, device):
        q, *coded, lens, _, _, scale, _, words, _, _, softcap = make(dtype, device)
        q = q[:, None].expand(-1, 3, -1, -1).contiguous()
        return q, *coded, lens, None, None, None, 1, scale, None, words, None, None, softcap

    check(Case("decode_attention", "codes-softcap", make), name, torch.bfloat16, device)
    check(Case("append_attention", "codes-softcap", append), name, torch.bfloat16, device)


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf"), 1e39, 1e-50])
def test_a_wrong_cap(softcap):
    q, k, v = attention_inputs(1, 4, 2, 8, 32, torch.float32)
    with pytest.raises(ValueError, match="'softcap': expected a positive number or None"):
        ops.decode_attention(q, k, v, ints([8]), softcap=softcap)


@pytest.mark.parametrize("method", [Full(), Delta.example(256), LazyEviction.example(256)], ids=str)
def test_gemma2_decodes_as_stock(method):
    """Left-padded, with a cap that its logits reach; in a second turn too."""
    stock = generate()
    with kvcomp.patch(gemma2(), method):
        assert torch.equal(generate(), stock)
        first = generate(max_new_tokens=4, return_dict_in_generate=True)
        more = torch.cat([first.sequences, IDS[:, :5]], 1)
        mask = torch.cat([MASK, torch.ones(2, 9, dtype=torch.long)], 1)
        given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 4096}
        cache = first.past_key_values
        turn = gemma2().generate(more, attention_mask=mask, past_key_values=cache, **given)
    again = gemma2().generate(more, attention_mask=mask, **given)
    assert torch.equal(turn, again)


@pytest.mark.parametrize("method", [Delta.example(8), LazyEviction.example(16)], ids=str)
def test_gemma2_decodes_with_the_gpu_kernels(method, monkeypatch):
    """CUDA code in place of the CPU's, in budgets that leave tokens out."""
    with kvcomp.patch(gemma2(), method):
        want = generate(max_new_tokens=6)
    calls = []
    for name in "decode_attention", "append_attention", "attend_and_select":
        module, emulated = sys.modules[f"kvcomp.ops.{name}"], ops.OPS[name].impl("cuda-host")
        called = functools.partial(lambda run, *args: calls.append(args) or run(*args), emulated)
        monkeypatch.setattr(module, "_op", called)
    with kvcomp.patch(gemma2(), method):
        assert torch.equal(generate(max_new_tokens=6), want)
    assert calls


def test_the_cap_is_felt():
    free = every_model.tiny(AutoModelForCausalLM, "gemma2", attn_logit_softcapping=None)
    assert not torch.equal(
        free.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False), generate()
    )
