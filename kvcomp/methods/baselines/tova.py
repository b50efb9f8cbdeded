"""TOVA: token omission via attention (arXiv 2401.06104).

Keeps the tokens that the current query attends to most, by the mean over all heads: one set for a
layer. Published with an eviction at every step and nothing exempt, not even the newest token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import ObservingEviction


@dataclass(frozen=True)
class TOVA(ObservingEviction, name="tova", baseline=True):
    """Score: the latest query's probability."""

    unit: str = "layer"

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        if "latest" not in layer.slots:
            layer.track("latest", self.num_units(layer), torch.float32)

    def observe(self, layer: LayerCache, logits: Tensor, lse: Tensor) -> None:
        if (layer.cache.steps + 1) % self.window == 0:  # only an eviction asks for it
            super().observe(layer, logits, lse)

    def measure(self, layer: LayerCache, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        return self.probabilities(layer, logits, lse, lens)

    def record(self, layer: LayerCache, note: Tensor) -> None:
        layer.slots["latest"][..., : layer.max_len] = note[..., : layer.max_len]

    def score(self, layer: LayerCache) -> Tensor:
        return layer.slots["latest"][..., : layer.max_len]
