"""ArkVale: pages recalled from host memory by a box around their keys (NeurIPS 2024).

A page's digest is the centre of its keys and the mean absolute deviation from it, per channel; the
bound is that of Quest over the box centre +- deviation. Selection at every step. Differences: each
KV head has a set of its own (ArkVale's heads share one by default), and what leaves the device is
what is not selected (ArkVale keeps a cache with a policy of eviction).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.methods import alike
from kvcomp.methods.baselines._pages import PagedRetrieval


@dataclass(frozen=True)
class ArkVale(PagedRetrieval, name="arkvale", baseline=True):
    """Pages by centre and deviation, selected at every step."""

    page_size: int = 32

    def digest(self, keys: Tensor) -> Tensor:
        count = keys.shape[-2]
        centre = alike.total(keys.float(), -2) / count
        apart = alike.total((keys.float() - centre[..., None, :]).abs(), -2) / count
        return torch.cat([centre, apart], -1).to(keys.dtype)

    def turned(self, q: Tensor) -> Tensor:
        return torch.cat([q, q.abs()], -1)
