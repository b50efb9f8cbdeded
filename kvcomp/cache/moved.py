"""Moved: tokens of a layer that move to another context, or within their own.

A further chunk of Delethink begins with tokens of the one before it, and a cache may begin with
those of another. K and V stay as they are; keys are rotated where their positions change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.rows import EightBits, Rows
from kvcomp.cache.staged import Staged


class Moved(Staged):
    """The part of a layer that moves tokens."""

    scale: float
    _placed: Tensor
    _placed_columns: int

    if TYPE_CHECKING:
        eight_bits: EightBits | None

        def _enter(self, new: Rows, valid: Tensor | None) -> None: ...
        def _recount(self, most: int) -> None: ...
        def _require_whole(self, what: str) -> None: ...
        def _take_back(self, count: int) -> Tensor | int: ...

    def adopt(self, other: Moved, columns: int, room: int) -> None:
        """Copy the first `columns` columns of `other` into this empty layer (`KVCache.adopt`)."""
        other._require_whole("adopt")
        arrivals = other._arrivals.part(0, columns)
        lens = arrivals.tokens()
        self._dtype = other._dtype
        self._reserve(other.stored(), room)
        if isinstance(lens, int):
            longest, valid = lens, None
        else:
            longest = int(lens.max())
            valid = torch.arange(longest, device=lens.device) < lens[:, None]
        self._enter(other.stored(longest), valid)
        self.columns, self.scale, self._arrivals = columns, other.scale, arrivals

    def truncate(self, columns: int, kept: int) -> None:
        """Go back to the first `columns` columns. The slots of a row keep its first `kept` tokens;
        the others are in host memory."""
        self._take_back(self.columns - columns)
        self.seq_lens.copy_(self.logical_lens.clamp(max=kept))
        for tensor in self.slots.values():
            tensor[..., kept:] = 0
        self._placed, self._placed_columns = self.logical_lens.clone(), columns
        self._recount(kept)

    def fold(self, first: int, last: int, inv_freq: Tensor) -> None:
        """Remove columns [first, last), none of which is padding, from the middle.

        The tokens after them keep their K and V, with their keys rotated to the new positions.

        Args:
            first, last: if last < first, columns [last, first) appear twice afterwards.
            inv_freq: [R / 2] fp32, see `ops.rotate_keys`.

        Raises:
            ValueError: tokens have been evicted, so slots no longer equal columns.
        """
        self._require_whole("fold")
        count, moved = last - first, self.columns - last
        self._reserve(self.stored(1), self.max_len - count)  # where pieces overlap
        step = torch.arange(moved, device=self.seq_lens.device)
        old = (self.seq_lens.long() - moved)[:, None] + step  # [B, moved] slots
        rows = torch.arange(len(old), device=old.device)[:, None]
        kept = self.stored(self.capacity).parts
        tokens = Rows(*(part[rows, :, old].transpose(1, 2) for part in kept))  # copies
        tokens = self._rotated(tokens, torch.full_like(self.seq_lens, -count), inv_freq)
        for part, value in zip(kept, tokens.parts, strict=True):
            part[rows, :, old - count] = value.transpose(1, 2)
        before, behind = (self._arrivals.part(*x) for x in ((0, first), (last, self.columns)))
        self._arrivals = before.joined(behind)
        self.columns -= count
        self.seq_lens -= count
        self.logical_lens -= count
        self.max_len -= count

    def replace_keys(self, keys: Tensor) -> None:
        """The first n tokens get keys [B, Hkv, n, D] in place of theirs."""
        old = self.stored(keys.shape[2])
        if self.eight_bits is None:
            old.k.copy_(keys)
            return
        new = self.eight_bits.with_keys(old, keys)
        for part, value in zip(old.parts, new.parts, strict=True):
            part.copy_(value)

    def _rotated(self, tokens: Rows, shift: Tensor, inv_freq: Tensor) -> Rows:
        """Tokens [B, Hkv, n, D] with their keys rotated, which may change these. V stays."""
        if self.eight_bits is None:
            ops.rotate_keys(tokens.k, shift, inv_freq)
            return tokens
        k, _ = self.eight_bits.decode(tokens, torch.float32)
        ops.rotate_keys(k, shift, inv_freq)
        return self.eight_bits.with_keys(tokens, k)
