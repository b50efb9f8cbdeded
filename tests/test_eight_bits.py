"""K and V in eight bits: every method decodes as dense eight bits, and moves them bit by bit."""

import copy
from types import SimpleNamespace

import pytest
import torch

import kvcomp
from kvcomp import Delethink, Full
from kvcomp.cache import KVCache
from kvcomp.cache.rows import EightBits
from kvcomp.hf.eight_bits import eight_bits
from kvcomp.methods import METHODS
from kvcomp.ops import OPS
from kvcomp.testing.models import tiny_model

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :7] = 0  # padding


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=3)


def generate(model, method, new=16, **options):
    given = {"eos_token_id": 1, "do_sample": False, **options.pop("given", {})}
    with kvcomp.patch(model, method, **options) as run:
        out = model.generate(
            IDS,
            attention_mask=MASK,
            max_new_tokens=new,
            min_new_tokens=new,
            **given,
        )
    return out, run.report()


@pytest.fixture(scope="module")
def dense(model):
    return generate(model, Full(), kv="int8")


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"delethink"}))
def test_what_keeps_all_decodes_as_dense_eight_bits(name, model, dense):
    method = METHODS[name].example(128)
    out, report = generate(model, method, kv="int8")
    assert torch.equal(out, dense[0])
    _, plain = generate(model, method)
    dim = model.config.head_dim
    row, wide = 2 * dim + 4, 2 * dim * 4  # bytes of a token and head; the model is in fp32
    assert report.kv_bytes_peak * wide == plain.kv_bytes_peak * row
    assert report.host_bytes_peak * wide == plain.host_bytes_peak * (2 * dim + 16)
    assert report.kv_bytes_dense == plain.kv_bytes_dense


def two_turns(model, method):
    """Of a padded batch, so that rows have different lengths."""
    more = torch.cat([MASK, torch.ones_like(MASK[:, :14])], 1)
    with kvcomp.patch(model, method, kv="int8"):
        first = model.generate(
            IDS,
            attention_mask=MASK,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        ids = torch.cat([first.sequences, IDS[:, :6]], 1)
        return model.generate(
            ids,
            attention_mask=more,
            past_key_values=first.past_key_values,
            max_new_tokens=8,
            do_sample=False,
        )


def test_a_further_turn_attends_to_the_codes_of_the_one_before(model):
    want = two_turns(model, Full())
    for name in ("quest", "louis-kv", "lazy-eviction"):
        assert torch.equal(two_turns(model, METHODS[name].example(128)), want), name


def test_tokens_are_those_of_a_static_cache_and_of_half_the_chunks(model, dense):
    static, _ = generate(model, Full(), kv="int8", max_tokens=64)
    assert torch.equal(static, dense[0])
    chunks = Delethink(chunk=40, carry=10, head=2, max_chunks=3, reset="rotate")
    _, report = generate(model, chunks, new=60, kv="int8")
    assert report.boundaries >= 1
    beams, _ = generate(model, Full(), kv="int8", given={"num_beams": 2})
    assert beams.shape == dense[0].shape


# --- a cache by itself ----------------------------------------------------------------------------


def filled(method, turn=True, count=30):
    cache = KVCache(method, 1, eight_bits=EightBits(turn))
    layer = cache.layers[0]
    k, v = torch.randn(2, 2, 2, count, 32, generator=torch.Generator().manual_seed(2))
    valid = torch.arange(count) >= torch.tensor([[0], [4]])
    layer.append(k, v, valid)
    return cache, layer, k, v


def bits(rows):
    return [part.clone() for part in rows.parts]


def test_rows_stand_for_what_came_in():
    for turn in True, False:
        _cache, layer, k, v = filled(Full(), turn)
        for got, want in ((layer.keys, k), (layer.values, v)):
            step = want[0].abs().amax(-1, keepdim=True) / 127
            factor = 4 if turn else 0.52  # of a turned row, all elements err together
            assert ((got[0, :, :30] - want[0]).abs() <= factor * step).all()
        assert layer.slot_bytes == 2 * (2 * 32 + 4) and layer.token_bytes == 2 * 2 * 32 * 4
        assert layer.note_bytes == 0


def test_what_moves_tokens_moves_their_codes_and_scales():
    _cache, layer, *_ = filled(Full())
    before = layer.stored()
    gone = torch.tensor([[[3, 7, 28]], [[0, 1, 2]]], dtype=torch.int32)
    kept = torch.tensor([27, 23], dtype=torch.int32)
    old = bits(before)
    layer.evict(gone, kept, 23, 27)
    now = layer.stored()
    for part, was in zip(now.parts, old, strict=True):
        assert torch.equal(part[0, :, 3], was[0, :, 27]) and torch.equal(
            part[0, :, 7], was[0, :, 29]
        )
        for slot in (0, 5, 26):
            assert torch.equal(part[0, :, slot], was[0, :, slot])
        assert torch.equal(part[1, :, 0], was[1, :, 23])


def test_crop_reorder_growth_and_copies_change_no_bit():
    _cache, layer, k, v = filled(Full())
    old = bits(layer.stored())
    copied = copy.deepcopy(layer.cache)
    twin = copied.layers[0]
    layer.append(*(x.repeat(1, 1, 20, 1) for x in (k, v)))  # grows
    layer.crop(600)
    for each in (layer, twin):
        for part, was in zip(each.stored().parts, old, strict=True):
            assert torch.equal(part[0, :, :30], was[0, :, :30])
            assert torch.equal(part[1, :, :26], was[1, :, :26])
    layer.select(torch.tensor([1, 0, 1]))
    for part, was in zip(layer.stored().parts, old, strict=True):
        assert torch.equal(part[2, :, :26], was[1, :, :26])


def test_a_bad_row_poisons_those_who_see_it_and_no_other():
    _, _, k, v = filled(Full(), count=30)
    k[0, 0, 5, 3], v[1, 1, 20, 0] = torch.nan, torch.inf
    cache = KVCache(Full(), 1, eight_bits=EightBits(True))
    cache.layers[0].append(k, v)
    q = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(3))
    out, _ = cache.layers[0].attend(q, 0.2)
    bad = out.isnan().any(-1)
    assert bad[0].tolist() == [True, True, False, False]
    assert bad[1].tolist() == [False, False, True, True]
    page_ids = torch.tensor([[[0, 1]], [[0, 1]]], dtype=torch.int32)
    lens = torch.tensor([2, 2], dtype=torch.int32)
    out, _ = cache.layers[0].attend(q, 0.2, page_ids=page_ids, page_size=1, seq_lens=lens)
    assert out.isfinite().all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kv": "fp8"}, "kv: expected 'model' or 'int8', got 'fp8': no kernel here multiplies it"),
        ({"kv": 8}, "kv: expected 'model' or 'int8', got 8"),
        ({"kv_rotate": True}, "kv_rotate: expected None with kv='model', got True"),
        ({"kv": "int8", "kv_rotate": "yes"}, "kv_rotate: expected True, False or None"),
    ],
)
def test_what_is_refused(options, words, model):
    with pytest.raises((TypeError, ValueError), match=words):
        kvcomp.patch(model, Full(), **options)
    kvcomp.patch(model, Full()).undo()  # nothing stayed patched


def test_a_gpu_is_no_reason_to_refuse(model):
    """Every op that takes codes, or makes them, has a kernel there; torch writes them to caches."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=model.config)
    assert eight_bits(on_gpu, "int8", None) == EightBits(turn=True)
    for name, op in OPS.items():
        if ("words" in op.schema and name != "append_rows") or name == "hadamard":
            assert op.missing.get("cuda") != "not written", name


def test_layers_with_heads_of_another_size_beside_those_managed():
    """In Gemma 4 the sliding ones."""
    out, report = generate(tiny_model("gemma4_text"), Full(), new=4, kv="int8")
    assert out.shape[1] == IDS.shape[1] + 4
    assert report.kv_bytes_kept * 4 * 2 * 64 == report.kv_bytes_dense * (2 * 64 + 4)


def test_heads_of_no_power_of_two_are_not_turned():
    odd = tiny_model(
        "llama", num_hidden_layers=1, hidden_size=192, num_attention_heads=2, head_dim=96
    )
    with pytest.raises(ValueError, match="head size of 96 is no power of two"):
        kvcomp.patch(odd, Full(), kv="int8", kv_rotate=True)
    generate(odd, Full(), new=4, kv="int8")
