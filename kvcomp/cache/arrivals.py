"""Arrivals: the columns of a batch that a layer has seen, with their padding."""

from __future__ import annotations

import torch
from torch import Tensor

Piece = tuple[int, Tensor | None]  # columns, and [B, columns] bool, False for padding; None: none


class Arrivals:
    """Columns in the order of their arrival, padding included."""

    def __init__(self, pieces: list[Piece] | None = None) -> None:
        self._pieces = [] if pieces is None else pieces

    def add(self, count: int, valid: Tensor | None) -> None:
        """Add columns. Columns without padding extend the last piece."""
        if valid is None and self._pieces and self._pieces[-1][1] is None:
            count += self._pieces.pop()[0]
        self._pieces.append((count, valid))

    def part(self, first: int, last: int) -> Arrivals:
        """Columns [first, last)."""
        pieces, begin = [], 0
        for columns, valid in self._pieces:
            low, high = max(first - begin, 0), min(last - begin, columns)
            if low < high:
                pieces.append((high - low, None if valid is None else valid[:, low:high]))
            begin += columns
        return Arrivals(pieces)

    def joined(self, other: Arrivals) -> Arrivals:
        """These columns, followed by the columns of `other`."""
        return Arrivals(self._pieces + other._pieces)

    @property
    def padded(self) -> bool:
        """Whether some columns may be padding."""
        return any(valid is not None for _, valid in self._pieces)

    def tokens(self) -> Tensor | int:
        """The number of columns that are tokens: [B] int32, or one number for all rows."""
        return sum(n if valid is None else valid.sum(1).int() for n, valid in self._pieces)

    def valid(self, batch: int, device: torch.device) -> Tensor:
        """[B, columns] bool: False for padding."""
        row = torch.ones(batch, 1, dtype=torch.bool, device=device)
        return torch.cat([row.expand(-1, n) if v is None else v for n, v in self._pieces], 1)

    def select(self, rows: Tensor) -> None:
        """Rows become `rows` ([B'] int64 indices)."""
        if self.padded:  # one piece to reorder, not one per step
            whole = self.valid(len(next(v for _, v in self._pieces if v is not None)), rows.device)
            self._pieces = [(whole.shape[1], whole[rows])]
