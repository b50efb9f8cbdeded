"""Latents in host memory: a pool row is a token's row by its halves, where others have K and V."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.host_pool import HostMemory, HostPool
from kvcomp.cache.hosted import Hosted

if TYPE_CHECKING:
    from kvcomp.cache.latent import LatentLayer


class LatentPool(HostPool):
    """Rows [B, 1, rows, 2, D / 2], read and written whole.

    Args:
        like: rows [B, 1, n, D].
        rank: columns of a row that are its value.
    """

    def __init__(self, like: Tensor, memory: HostMemory, rank: int) -> None:
        super().__init__(like.chunk(2, -1)[0], memory)
        self.rank = rank

    def write(self, row: int, first: int, k: Tensor, v: Tensor) -> None:
        """Rows [first, first + n) of sequence `row` become k [1, n, D], of which v is a part."""
        super().write(row, first, *k.chunk(2, -1))

    def read(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows [first, last): keys [1, n, D], and their values [1, n, rank]."""
        rows = torch.cat(super().read(row, first, last), -1)
        return rows, rows[..., : self.rank]


class HostedLatents(Hosted):
    """As `Hosted`, for a layer of latents."""

    def _new_pool(self, layer: LatentLayer, memory: HostMemory) -> HostPool:
        return LatentPool(layer.keys, memory, layer.rank)

    def store(self, layer: LatentLayer, closed: Tensor, means: Tensor) -> None:
        super().store(layer, closed, torch.empty_like(means[..., : layer.moved[0].shape[-1]]))
        for row in closed.nonzero().flatten().tolist():  # the op knows the mean of a half
            unit = int(self.index.num_units[row]) - 1
            begin, end = self.index.starts[row, 0, unit : unit + 2].tolist()
            means[row, :, unit] = self.pool.read(row, begin, end)[0].mean(-2)
