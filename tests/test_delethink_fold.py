"""What Delethink asks of a cache, to fold, adopt and truncate, against slow readings."""

import pytest
import torch

from kvcomp import Full, LazyEviction
from kvcomp.cache import KVCache
from kvcomp.cache.slab import FIRST_CAPACITY
from slow.eviction import DIM, INV_FREQ, KV_HEADS, rotate

pytestmark = pytest.mark.usefixtures("one_thread")


LENS, WIDTH, STEPS = (5, 9, 7), 9, 12


class Rows:
    """A layer of ragged rows, and the tokens that each should hold: `where` they should be."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (len(LENS), KV_HEADS, 400, DIM)
        self.raw = torch.randn(shape, generator=generator)  # by column, before rotation
        self.v = torch.randn(shape, generator=generator)
        self.columns, self.rows = [], [[] for _ in LENS]  # columns kept; columns of a row's tokens
        self.used = 0
        self.cache = KVCache(Full(), 1)
        self.layer = self.cache.layers[0]

    def append(self, count, padding=(0, 0, 0)):
        own = range(self.used, self.used + count)
        self.used += count
        keys, valid = self.raw[:, :, own].clone(), torch.ones(len(LENS), count, dtype=torch.bool)
        for row, (tokens, pad) in enumerate(zip(self.rows, padding, strict=True)):
            positions = len(tokens) - pad + torch.arange(count)
            keys[row] = rotate(keys[row], positions).float()
            valid[row, :pad] = False
            tokens += own[pad:]
        self.columns += own
        values = self.v[:, :, own]
        self.layer.append(keys, values, None if valid.all() else valid)

    def drop(self, first, last):
        gone = self.columns[first:last]
        self.columns = [x for x in self.columns if x not in gone]
        self.rows = [[x for x in tokens if x not in gone] for tokens in self.rows]

    def check(self, layer=None):
        layer = self.layer if layer is None else layer
        assert layer.columns == len(self.columns)
        assert layer.max_len == max(map(len, self.rows))
        for lens in (layer.seq_lens, layer.logical_lens):
            assert lens.tolist() == [len(tokens) for tokens in self.rows]
        seen = [[column in tokens for column in self.columns] for tokens in self.rows]
        assert layer.seen().tolist() == seen
        for row, tokens in enumerate(self.rows):
            keys = rotate(self.raw[row][:, tokens], range(len(tokens))).float()
            torch.testing.assert_close(
                layer.keys[row, :, : len(tokens)], keys, rtol=1e-4, atol=1e-5
            )
            assert torch.equal(layer.values[row, :, : len(tokens)], self.v[row][:, tokens])


def filled(padded=True):
    rows = Rows()
    rows.append(WIDTH, [WIDTH - n for n in LENS] if padded else (0, 0, 0))
    for _ in range(STEPS):
        rows.append(1)
    rows.check()
    return rows


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("first", "last"), [(9, 10), (9, 14), (12, 20), (15, 21), (11, 11)])
def test_fold_against_keys_turned_from_scratch(first, last, padded):
    rows = filled(padded)
    for again in range(2):
        rows.layer.fold(first, last, INV_FREQ)
        rows.drop(first, last)
        rows.check()
        for _ in range(last - first + again):
            rows.append(1)
        rows.check()
    rows.layer.crop(3)
    rows.drop(len(rows.columns) - 3, None)
    rows.check()


def test_fold_where_the_pieces_overlap():
    """The carry begins within the head: its first tokens are there twice, and need room."""
    rows = Rows()
    rows.append(FIRST_CAPACITY - 3)
    rows.layer.fold(FIRST_CAPACITY - 5, FIRST_CAPACITY - 10, INV_FREQ)
    rows.columns = [*range(FIRST_CAPACITY - 5), *range(FIRST_CAPACITY - 10, FIRST_CAPACITY - 3)]
    rows.rows = [list(rows.columns) for _ in LENS]
    rows.check()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("columns", [6, 9, 15, 21])
def test_adopt_copies_the_first_columns(columns, padded):
    rows = filled(padded)
    before = rows.layer.keys.clone()
    rows.layer.scale = 0.25
    copied = KVCache(Full(), 1)
    copied.adopt(rows.cache, columns, room=700)
    layer = copied.layers[0]
    assert layer.capacity == 700 and layer.scale == 0.25
    part = Rows()
    part.layer, part.used = layer, rows.used
    part.columns = rows.columns[:columns]
    part.rows = [[x for x in tokens if x in part.columns] for tokens in rows.rows]
    part.check()
    part.append(4)
    part.append(1)
    part.check()
    layer.crop(7)
    part.drop(columns - 2, None)
    part.check()
    assert torch.equal(rows.layer.keys, before), "the copy shares memory"
    rows.check()


def test_truncate_keeps_the_first_slots():
    rows = filled()
    layer, kept = rows.layer, rows.layer.keys[:, :, :3].clone()
    layer.positions(KV_HEADS)
    layer.truncate(WIDTH, 3)
    assert layer.columns == WIDTH and layer.max_len == 3
    assert layer.seq_lens.tolist() == [3, 3, 3]
    assert layer.logical_lens.tolist() == list(LENS)
    assert torch.equal(layer.keys, kept)
    assert not layer.slots["position"][..., 3:].any()
    layer.append(*(torch.randn(3, KV_HEADS, 2, DIM) for _ in range(2)))
    for row, n in enumerate(LENS):
        assert layer.positions(KV_HEADS)[row].tolist() == [[0, 1, 2, n, n + 1]] * KV_HEADS
    assert layer.seen().sum(1).tolist() == [n + 2 for n in LENS]


def test_only_a_whole_layer_folds_or_is_adopted():
    def noted(layer):
        layer.positions(KV_HEADS)

    def evicted(layer):
        layer.keep(torch.arange(4).expand(3, -1), torch.full((3,), 4, dtype=torch.int32))

    def repeated(layer):
        layer.repeat_heads(2 * KV_HEADS)

    for change in (noted, evicted, repeated):
        rows = filled()
        change(rows.layer)
        with pytest.raises(ValueError, match="fold: expected a layer that keeps every token"):
            rows.layer.fold(1, 2, INV_FREQ)
        with pytest.raises(ValueError, match="adopt: expected a layer that keeps every token"):
            KVCache(Full(), 1).adopt(rows.cache, 3, room=9)


def test_a_method_goes_back_as_far_as_it_can():
    """Dense attention to just there, an evicting method to nothing."""
    for method, stay in ((Full(), 11), (LazyEviction(budget=300, window=4), 0)):
        cache = KVCache(method, 2)
        rows = torch.randn(2, KV_HEADS, 14, DIM)
        for layer in cache.layers:
            layer.append(rows, rows)
            cache.prefill(layer, rows, 1.0)
        assert method.rewind(cache, 11) == stay
        assert [layer.columns for layer in cache.layers] == [stay, stay]
