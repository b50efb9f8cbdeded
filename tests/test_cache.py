"""The slab cache: ragged rows, growth, crop and row selection, against lists of tokens."""

import pytest
import torch

from kvcomp.cache import KVCache
from kvcomp.cache.layer import FIRST_CAPACITY
from kvcomp.methods import Full

BATCH, HEADS, DIM = 3, 2, 32


class Rows:
    """What a row should hold, kept the slow way: one list of token tensors per row."""

    def __init__(self) -> None:
        self.cache = KVCache(Full(), 1)
        self.layer = self.cache.layers[0]
        self.rows = [[] for _ in range(BATCH)]
        self.columns = []  # per column, which rows it was valid for

    def append(self, count, valid=None):
        k = torch.randn(len(self.rows), HEADS, count, DIM)
        self.layer.append(k, k + 1, valid)
        for column in range(count):
            took = [valid is None or bool(valid[row, column]) for row in range(len(self.rows))]
            for row, tokens in enumerate(self.rows):
                if took[row]:
                    tokens.append(k[row, :, column])
            self.columns.append(took)

    def crop(self, count):
        self.cache.crop(count)
        for _ in range(count):
            for tokens, took in zip(self.rows, self.columns.pop(), strict=True):
                if took:
                    tokens.pop()

    def select(self, rows):
        self.cache.select(torch.tensor(rows))
        self.rows = [list(self.rows[row]) for row in rows]
        self.columns = [[took[row] for row in rows] for took in self.columns]

    def check(self):
        layer = self.layer
        assert layer.columns == len(self.columns)
        assert layer.seq_lens.tolist() == [len(tokens) for tokens in self.rows]
        assert layer.max_len >= max(len(tokens) for tokens in self.rows)
        for row, tokens in enumerate(self.rows):
            if tokens:
                want = torch.stack(tokens, 1)
                assert torch.equal(layer.keys[row, :, : len(tokens)], want)
                assert torch.equal(layer.values[row, :, : len(tokens)], want + 1)


def left_padding(*lengths):
    width = max(lengths)
    return torch.tensor([[column >= width - n for column in range(width)] for n in lengths])


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


def test_reset_gives_memory_back():
    rows = Rows()
    rows.append(10)
    assert rows.layer.capacity > 0
    rows.cache.reset()
    assert rows.layer.capacity == 0


def test_mismatch_is_refused_and_nothing_is_lost():
    rows = Rows()
    rows.append(4)
    k = torch.randn(BATCH, HEADS, 1, DIM)
    for bad_k, bad_v, what in (
        (k[:2], k[:2], "batch size"),
        (k[..., :16], k[..., :16], "head size"),
        (k.half(), k.half(), "dtype"),
        (k, k[..., :16], "one shape"),
        (k[:, :, :0], k[:, :, :0], "nothing empty"),
    ):
        with pytest.raises(ValueError, match=what):
            rows.layer.append(bad_k, bad_v)
    with pytest.raises(ValueError, match="valid"):
        rows.layer.append(k, k, torch.ones(BATCH, 2, dtype=torch.bool))
    rows.check()
