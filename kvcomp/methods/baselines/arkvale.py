"""ArkVale: pages recalled from host memory by a box around their keys (NeurIPS 2024).

The digest of a page is the centre of its keys and the mean absolute deviation from it, per channel.
Quest's bound is taken over the box centre +- deviation. Pages are selected at every step.
Differences: each KV head has its own set (ArkVale's heads share one by default), and pages that are
not selected leave the device at once (ArkVale keeps a cache with an eviction policy).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.methods import alike
from kvcomp.methods.baselines._pages import PagedRetrieval


@dataclass(frozen=True)
class ArkVale(PagedRetrieval, name="arkvale", baseline=True):
    """Selects pages at every step by centre and deviation of their keys."""

    page_size: int = 32

    def digest(self, keys: Tensor) -> Tensor:
        count = keys.shape[-2]
        centre = alike.total(keys.float(), -2) / count
        apart = alike.total((keys.float() - centre[..., None, :]).abs(), -2) / count
        return torch.cat([centre, apart], -1).to(keys.dtype)

    def turned(self, q: Tensor) -> Tensor:
        return torch.cat([q, q.abs()], -1)
