"""Latents in host memory. A pool row holds the two halves of a token's row in place of K and V."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.host_pool import HostMemory, HostPool
from kvcomp.cache.hosted import Hosted
from kvcomp.cache.rows import Rows

if TYPE_CHECKING:
    from kvcomp.cache.layer import LayerCache


class LatentPool(HostPool):
    """Rows [B, 1, rows, 2, D / 2], read and written whole.

    Args:
        like: rows [B, 1, n, D].
    """

    def __init__(self, like: Rows, memory: HostMemory) -> None:
        super().__init__(_halves(like), memory)

    def write(self, row: int, first: int, new: Rows) -> None:
        super().write(row, first, _halves(new))

    def read(self, row: int, first: int, last: int) -> Rows:
        """Rows [first, last), [1, n, D], and no V."""
        rows = torch.cat(super().read(row, first, last).parts, -1)
        return Rows(rows, rows[..., :0])


def _halves(rows: Rows) -> Rows:
    first, second = rows.k.chunk(2, -1)
    return Rows(first, second)


class HostedLatents(Hosted):
    """Like `Hosted`, for a layer of latents."""

    def _new_pool(self, layer: LayerCache, memory: HostMemory) -> HostPool:
        return LatentPool(layer.stored(), memory)

    def store(self, layer: LayerCache, closed: Tensor, means: Tensor) -> None:
        super().store(layer, closed, torch.empty_like(means[..., : layer.moved[0].shape[-1]]))
        for row in closed.nonzero().flatten().tolist():  # the op computes the mean of a half only
            unit = int(self.index.num_units[row]) - 1
            begin, end = self.index.starts[row, 0, unit : unit + 2].tolist()
            means[row, :, unit] = self.pool.read(row, begin, end).k.mean(-2)
