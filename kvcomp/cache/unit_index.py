"""UnitIndex: the units in which tokens are retrieved, with a digest of each.

Unit u of a head holds pool rows [starts[u], starts[u + 1]). Units are appended in the order of
their rows. The tokens after the last unit form the open segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 1 / 8  # per growth: a prompt has thousands of units, and decoding adds one in ten steps
FIRST_UNITS = 64  # smallest growth


class UnitIndex:
    """The units of one layer.

    Attributes:
        starts: [B, Hkv, capacity + 1] int32.
        digests: [B, Hkv, capacity, W]; `unit_scores` compares queries with them.
        num_units: [B] int32, closed units.
        num_indexed: [B] int32, units that can be selected; later units are still local.
        bound: an upper bound of the units in a row, known on the host.
    """

    def __init__(self, batch: int, heads: int, width: int, like: Tensor) -> None:
        """An empty index with digests of the dtype and device of `like`; all tokens are open."""
        self.starts = torch.zeros(batch, heads, 1, dtype=torch.int32, device=like.device)
        self.digests = like.new_empty(batch, heads, 0, width)
        self.num_units = torch.zeros(batch, dtype=torch.int32, device=like.device)
        self.num_indexed = torch.zeros_like(self.num_units)
        self.bound = 0

    @property
    def capacity(self) -> int:
        return self.digests.shape[2]

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.digests.nbytes

    def reserve(self, count: int) -> None:
        """Make room for `count` more units in every row. The caller then appends them."""
        self.bound += count
        if self.bound <= self.capacity:
            return
        self.bound = int(self.num_units.max()) + count  # the bound may have been generous
        if self.bound <= self.capacity:
            return
        more = max(self.bound - self.capacity, int(self.capacity * GROWTH), FIRST_UNITS)
        batch, heads, _, width = self.digests.shape
        self.starts = torch.cat([self.starts, self.starts.new_zeros(batch, heads, more)], 2)
        digests = self.digests.new_empty(batch, heads, self.capacity + more, width)
        digests[:, :, : self.digests.shape[2]] = self.digests
        self.digests = digests

    def write(self, row: int, unit: int, digests: Tensor, sizes: Tensor) -> None:
        """Units [unit, unit + n) of sequence `row`: digests [Hkv, n, W], sizes [Hkv, n]."""
        count = sizes.shape[1]
        self.digests[row, :, unit : unit + count] = digests.where(sizes[..., None] > 0, 0.0)
        ends = self.starts[row, :, unit : unit + 1] + sizes.cumsum(-1)
        self.starts[row, :, unit + 1 : unit + 1 + count] = ends

    def close(self, ends: Tensor) -> None:
        """Append one unit to every row. It ends before pool row ends[b]."""
        self.num_units += 1
        index = self.num_units[:, None, None].long().expand(-1, self.starts.shape[1], 1)
        self.starts.scatter_(2, index, ends[:, None, None].expand_as(index).int())

    def first_local(self) -> Tensor:
        """[B] int32: the first row that cannot be selected yet."""
        return self.starts[:, 0].gather(1, self.num_indexed[:, None].long())[:, 0]

    def first_open(self) -> Tensor:
        """[B] int32: the first row of the open segment."""
        return self.starts[:, 0].gather(1, self.num_units[:, None].long())[:, 0]

    def select(self, rows: Tensor) -> None:
        """Sequences become `rows` ([B'] int64)."""
        self.starts, self.digests = self.starts[rows], self.digests[rows]
        self.num_units, self.num_indexed = self.num_units[rows], self.num_indexed[rows]
