"""Layers of a small cache beside lists of their tokens."""

import torch

from kvcomp.cache import KVCache
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
