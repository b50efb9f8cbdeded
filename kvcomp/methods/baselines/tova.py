"""TOVA: token omission via attention (arXiv 2401.06104).

Keeps the tokens that the current query attends to most, averaged over all heads, with one set per
layer. As in the paper, it evicts at every step and protects no token, not even the newest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import ObservingEviction


@dataclass(frozen=True)
class TOVA(ObservingEviction, name="tova", baseline=True):
    """The score of a token is its probability under the latest query."""

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
