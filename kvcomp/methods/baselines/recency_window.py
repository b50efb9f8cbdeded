"""RecencyWindow: keeps the newest tokens.

It is the plain sliding window. Every score must beat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import Eviction


@dataclass(frozen=True)
class RecencyWindow(Eviction, name="recency-window", baseline=True):
    """The score of a token is its position."""

    unit: str = "layer"

    static: ClassVar[bool] = True

    def score(self, layer: LayerCache) -> Tensor:
        return layer.positions(self.num_units(layer)).float()
