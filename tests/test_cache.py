"""The slab cache: ragged rows, growth, crop and row selection, against lists of tokens."""

import copy
import gc
import weakref

import pytest
import torch

from cache_rows import BATCH, DIM, HEADS, Rows, left_padding
from kvcomp.cache import KVCache
from kvcomp.cache.slab import FIRST_CAPACITY
from kvcomp.methods import Full


def test_append_grows_in_place():
    rows = Rows()
    rows.append(FIRST_CAPACITY - 1)
    before = rows.layer.keys.data_ptr()
    rows.append(1)
    assert rows.layer.keys.data_ptr() == before
    rows.append(1)
    assert rows.layer.capacity > FIRST_CAPACITY + 1
    rows.check()


def test_padding_is_dropped_per_row():
    rows = Rows()
    rows.append(9, left_padding(9, 2, 5))
    rows.append(1)
    rows.append(4, torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool())
    rows.append(2)
    rows.check()


def test_crop_is_exact():
    rows = Rows()
    rows.append(7, left_padding(7, 3, 1))
    for _ in range(5):
        rows.append(1)
    rows.crop(3)
    rows.check()
    rows.append(2)
    rows.crop(6)  # into the padded prompt
    rows.check()
    rows.append(3)
    rows.check()
    with pytest.raises(ValueError, match="has seen"):
        rows.crop(100)


def test_crop_is_refused_where_tokens_are_gone():
    class Forgetful(Full):
        croppable = False

    cache = KVCache(Forgetful(), 1)
    k = torch.randn(BATCH, HEADS, 4, DIM)
    cache.layers[0].append(k, k)
    with pytest.raises(ValueError, match="Forgetful cannot take tokens back"):
        cache.crop(1)
    assert cache.layers[0].columns == 4


def test_tokens_leave_in_place_with_what_is_known_about_them():
    rows = Rows()
    layer = rows.layer
    rows.append(8, left_padding(8, 3, 5))
    rows.append(2)
    layer.track("mark", 1)[..., :10] = 100 + layer.positions(1)
    victims = torch.tensor([[[0, 2, 5, 9]], [[-1] * 4], [[1, -1, -1, -1]]], dtype=torch.int32)
    layer.evict(victims, torch.tensor([6, 6, 6], dtype=torch.int32), 0, 6)
    assert layer.seq_lens.tolist() == [6, 5, 6] and layer.logical_lens.tolist() == [10, 5, 7]
    rows.append(1)
    rows.append(FIRST_CAPACITY)  # the slab grows, and takes all of it along
    positions = layer.positions(1)[:, 0]
    kept = [[1, 3, 4, 6, 7, 8, 10], [0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5, 6, 7]]
    for row, tokens in enumerate(rows.rows):
        kept[row] += range(kept[row][-1] + 1, len(tokens))
        place = positions[row, : len(kept[row])]
        assert sorted(place.tolist()) == kept[row]
        want = torch.stack([tokens[i] for i in place.tolist()], 1)
        assert torch.equal(layer.keys[row, :, : len(place)], want)
        assert torch.equal(layer.values[row, :, : len(place)], want + 1)
        old = place[:6] if row != 1 else place[:5]
        assert torch.equal(layer.slots["mark"][row, 0, : len(old)], 100 + old)
        assert not layer.slots["mark"][row, 0, len(old) :].any()
    with pytest.raises(ValueError, match="tokens have been evicted"):
        rows.cache.crop(1)


def test_rows_move_together():
    rows = Rows()
    rows.append(6, left_padding(6, 2, 4))
    rows.select([2, 2, 0, 1])
    rows.append(2)
    rows.check()
    rows.select([3, 0])
    rows.crop(1)
    rows.check()


def test_heads_of_a_token_side_by_side(monkeypatch):
    """In another order in memory, and otherwise the same: growth, crop, reordering, copies."""
    monkeypatch.setattr("kvcomp.cache.slab.TOKEN_ROW", 4 * HEADS * DIM)
    rows = Rows()
    rows.layer.shared_sets = True
    rows.append(9, left_padding(9, 2, 5))
    for count in (1, FIRST_CAPACITY, 1):
        rows.append(count)
        stride = rows.layer.keys.stride()
        assert stride[1] == DIM and stride[2] == HEADS * DIM
        rows.check()
    rows.crop(3)
    rows.select([2, 0, 0])
    rows.append(2)
    rows.check()
    monkeypatch.setattr("kvcomp.cache.slab.TOKEN_ROW", 4 * HEADS * DIM + 1)
    short = Rows()
    short.layer.shared_sets = True
    short.append(4)
    assert short.layer.keys.stride(2) == DIM


def test_a_dropped_cache_is_gone_at_once():
    rows = Rows()
    rows.append(5)
    other = copy.deepcopy(rows.cache)
    assert all(layer.cache is other for layer in other.layers)
    slab = weakref.ref(rows.layer._k)
    gc.disable()  # so that nothing but the counting of references can free it
    try:
        del rows
        assert slab() is None
    finally:
        gc.enable()
    assert other.layers[0].keys.shape[2] == 5


def test_reset_gives_memory_back():
    rows = Rows()
    rows.append(10)
    assert rows.layer.capacity > 0
    rows.cache.reset()
    assert rows.layer.capacity == 0


def test_what_only_comes_with_tokens_says_so_before():
    layer = KVCache(Full(), 1).layers[0]
    early = {name: "the first append" for name in ("seq_lens", "logical_lens", "keys", "values")}
    early |= {name: "a method that retrieves has got the prompt" for name in ("hosted",)}

    def all_refuse(names):
        for name in names:
            with pytest.raises(AttributeError, match=f"there is none before {early[name]}"):
                getattr(layer, name)

    all_refuse(early)
    assert not (layer.filled or layer.allocated or layer.is_hosted) and layer.capacity == 0
    layer.append(torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3, 32))
    assert layer.filled and layer.allocated and layer.seq_lens.tolist() == [3]
    all_refuse(("hosted",))
    layer.reset()
    all_refuse(early)


def test_mismatch_is_refused_and_nothing_is_lost():
    rows = Rows()
    rows.append(4)
    k = torch.randn(BATCH, HEADS, 1, DIM)
    for bad_k, bad_v, what in (
        (k[:2], k[:2], "batch size"),
        (k[..., :16], k[..., :16], "head size"),
        (k.half(), k.half(), "dtype"),
        (k, k[..., :16], "head size of V"),
        (k[:, :, :0], k[:, :, :0], "none of them 0"),
    ):
        with pytest.raises(ValueError, match=what):
            rows.layer.append(bad_k, bad_v)
    with pytest.raises(ValueError, match="valid"):
        rows.layer.append(k, k, torch.ones(BATCH, 2, dtype=torch.bool))
    rows.check()


# What retrieval adds: tokens that go to a pool and come back.


def test_only_the_listed_tokens_stay():
    rows = Rows()
    layer = rows.layer
    rows.append(700, left_padding(700, 3, 5))
    rows.append(2)
    layer.positions(HEADS)
    slots = torch.tensor([[0, 1, 600, 701, 0], [0, 4, 2, 3, 1], [6, 5, 0, 0, 0]])
    layer.keep(slots, torch.tensor([4, 5, 2], dtype=torch.int32))
    assert layer.seq_lens.tolist() == [4, 5, 2] and layer.max_len == 5
    assert layer.logical_lens.tolist() == [702, 5, 7] and layer.columns == 702
    assert layer.capacity == FIRST_CAPACITY
    rows.append(1)
    positions = layer.positions(HEADS)
    for row, (lasting, count) in enumerate(zip(slots.tolist(), (4, 5, 2), strict=True)):
        kept = [*lasting[:count], len(rows.rows[row]) - 1]
        assert positions[row, :, : count + 1].tolist() == [kept] * HEADS
        want = torch.stack([rows.rows[row][i] for i in kept], 1)
        assert torch.equal(layer.keys[row, :, : count + 1], want)
        assert torch.equal(layer.values[row, :, : count + 1], want + 1)
    with pytest.raises(ValueError, match="tokens have been evicted"):
        rows.cache.crop(1)
