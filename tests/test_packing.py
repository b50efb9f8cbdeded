"""Packed prompts: the cache, the notes and the logits of prompts that are encoded one by one."""

import pytest
import torch

import kvcomp
from kvcomp import METHODS, Full, LazyEviction
from kvcomp.hf.prefill import packs, prefill
from kvcomp.testing.models import tiny_model
from kvcomp.thinking import Rows, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (5, 23, 1, 12)
NOTING = ("full", "delta", "lazy-eviction", "h2o", "louis-kv", "tidal-decode")


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


def padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", NOTING)
@torch.no_grad()
def test_rows_are_those_of_padded_prompts(name):
    model, rows = tiny_model("llama"), prompts()
    with kvcomp.patch(model, METHODS[name].example(16)) as run:
        cache, logits = prefill(run, rows)
        want = run.new_cache()
        given = padded(rows)
        places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**given, position_ids=places, past_key_values=want)
    torch.testing.assert_close(logits, out.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert cache.columns == want.columns and cache.rows == len(rows)
    assert torch.equal(cache.text.known(23), given["input_ids"])
    for got, layer in zip(cache.kv.layers, want.kv.layers, strict=True):
        assert torch.equal(got.seq_lens, layer.seq_lens) and torch.equal(got.seen(), layer.seen())
        assert got.state.keys() == layer.state.keys() and got.slots.keys() == layer.slots.keys()
        tables = {"k": (got.keys, layer.keys), "v": (got.values, layer.values)}
        tables |= {slot: (table, layer.slots[slot]) for slot, table in got.slots.items()}
        for slot, (table, known) in tables.items():
            for row, count in enumerate(layer.seq_lens.tolist()):
                one, other = (x[row, :, :count].double() for x in (table, known))
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=slot)


@pytest.mark.parametrize("inner", ["sdpa", "eager"])
@torch.no_grad()
def test_each_prompt_sees_itself_alone(inner):
    """K and V of each prompt by itself: bits of the attention, up to the order of a larger GEMM."""
    model, rows = tiny_model("qwen3", attn_implementation=inner), prompts()
    with kvcomp.patch(model, Full()) as run:
        cache, logits = prefill(run, rows)
        for row, ids in enumerate(rows):
            own = run.new_cache()
            want = model(torch.tensor([ids]), past_key_values=own).logits[0, -1]
            torch.testing.assert_close(logits[row], want, rtol=1e-4, atol=1e-4)
            for got, layer in zip(cache.kv.layers, own.kv.layers, strict=True):
                kept = got.keys[row, :, : len(ids)]
                torch.testing.assert_close(kept, layer.keys[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_up_to_32_tokens_have_the_bits_of_separate_prompts(dtype):
    """As many go through the linear layers of kvcomp, whose bits do not depend on their number."""
    model, rows = tiny_model("llama").to(dtype), prompts((5, 9, 3, 12))
    with kvcomp.patch(model, Full()) as run:
        cache, logits = prefill(run, rows)
        for row, ids in enumerate(rows):
            own = run.new_cache()
            assert torch.equal(
                logits[row], model(torch.tensor([ids]), past_key_values=own).logits[0, -1].float()
            )
            for got, layer in zip(cache.kv.layers, own.kv.layers, strict=True):
                assert torch.equal(got.keys[row, :, : len(ids)], layer.keys[0, :, : len(ids)])
                assert torch.equal(got.values[row, :, : len(ids)], layer.values[0, :, : len(ids)])


def test_ragged_rows_are_packed_and_decode_as_padded_ones(monkeypatch):
    """No token of padding goes through the model, and the rows say what `generate` says."""
    model, given = tiny_model("llama"), padded(prompts())
    seen = []
    monkeypatch.setattr(
        model.lm_head, "forward", lambda x, f=model.lm_head.forward: (seen.append(x.shape), f(x))[1]
    )
    with kvcomp.patch(model, LazyEviction(budget=20, window=4)) as run:
        options = {"do_sample": False, "eos_token_id": 1000, "max_new_tokens": 20}
        want = model.generate(**given, **options)[:, 23:]
        seen.clear()
        rows = Rows(run, given, Sampling(temperature=0, max_new_tokens=20), eos=[])
        assert seen == [(1, len(LENGTHS), model.config.hidden_size)]
        rows.finish()
    assert [row.ids for row in rows.all] == want.tolist()


def test_what_cannot_be_packed_is_padded_or_refused():
    model, given = tiny_model("gemma3_text"), padded(prompts())
    with kvcomp.patch(model, Full()) as run:
        assert not packs(run)
        with pytest.raises(ValueError, match="prefill: expected layers that all belong"):
            prefill(run, prompts())
        rows = Rows(run, given, Sampling(temperature=0, max_new_tokens=3), eos=[])
        rows.finish()
        assert rows.steps == 2
    llama = tiny_model("llama")
    with kvcomp.patch(llama, Full()) as run:
        for bad in ([], [[3], []]):
            with pytest.raises(ValueError, match="prompts: expected at least one"):
                prefill(run, bad)
