"""Rows: K and V of tokens as slabs and pools hold them, in the dtype of the model or as codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.ops.quantize_rows import WORD_ROOM, dequantized

KINDS = ("model", "int8")  # of K and V in a cache: as the model makes them, or in eight bits
WORDS = "words"  # what `Slab.slots` calls the scales: they move as all that is noted about a token


class Rows(NamedTuple):
    """K and V [..., n, D], and of codes their words [..., n]."""

    k: Tensor
    v: Tensor
    words: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.k, self.v) if self.words is None else (self.k, self.v, self.words)

    @property
    def scales(self) -> Tensor:
        """The words of codes."""
        assert self.words is not None, "only codes have scales"
        return self.words

    def row(self, index: int) -> Rows:
        """One sequence of rows [B, ...]."""
        return Rows(*(x[index] for x in self.parts))

    def part(self, tokens: slice) -> Rows:
        """Some tokens of rows [..., H, n, ...]."""
        k, v = self.k[..., tokens, :], self.v[..., tokens, :]
        return Rows(k, v, None if self.words is None else self.words[..., tokens])

    def take(self, index: Tensor, dim: int) -> Rows:
        """Tokens by `index`, which has the dimensions of words."""
        wide = index[..., None]
        k, v = (torch.take_along_dim(x, wide, dim) for x in self[:2])
        return Rows(
            k, v, None if self.words is None else torch.take_along_dim(self.words, index, dim)
        )


@dataclass(frozen=True)
class EightBits:
    """How K and V are kept in eight bits.

    Attributes:
        turn: K is turned by a Hadamard matrix before, as its queries are when they come; see
            `ops.hadamard`.
    """

    turn: bool

    def encode(self, k: Tensor, v: Tensor) -> Rows:
        """Rows of k, v [B, H, n, D]."""
        k_codes, v_codes = (torch.empty_like(x, dtype=torch.int8) for x in (k, v))
        words = k.new_empty(k.shape[:3], dtype=torch.int32)
        ops.quantize_rows(k, v, k_codes, v_codes, words, turn=self.turn)
        return Rows(k_codes, v_codes, words)

    def with_keys(self, rows: Rows, k: Tensor) -> Rows:
        """`rows` with other keys [B, H, n, D]; V keeps its codes."""
        new = self.encode(k, k)
        words = rows.scales & ~0xFFFF | new.scales & 0xFFFF  # K's scale is in the low half
        return Rows(new.k, rows.v, words)

    def decode(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V that `rows` stand for, K as it was before it was turned."""
        k, v = dequantized(rows.k, rows.v, rows.scales, torch.float32)
        if self.turn:
            k = ops.hadamard(k.contiguous())
        return k.to(dtype), v.to(dtype)

    def query(self, q: Tensor) -> Tensor:
        """q [..., D] as these keys want it."""
        return ops.hadamard(q.contiguous()) if self.turn else q

    @staticmethod
    def token_bytes(heads: int, dim: int) -> int:
        """Of K and V of one token, scales included."""
        return heads * (2 * dim + 4)

    @staticmethod
    def pool_bytes(heads: int, dim: int) -> int:
        """Of one token in a `HostPool`."""
        return heads * (2 * dim + WORD_ROOM)
