"""StrideRetrieval: clustered retrieval every so many steps, whatever the queries do.

What LouisKV's adaptive trigger must beat at equal link bytes: segments of the output are as long as
the stride, and a row selects anew where one ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.clustered import ClusteredRetrieval
from kvcomp.methods.retrieval import NEVER


@dataclass(frozen=True)
class StrideRetrieval(ClusteredRetrieval, name="stride-retrieval", baseline=True):
    """Clustered retrieval at a fixed stride; `tau` means nothing here.

    Attributes:
        stride: steps from one retrieval to the next.
    """

    stride: int = 10

    def __post_init__(self) -> None:
        self._require(self.stride >= 1, "stride", "at least 1 step", self.stride)
        object.__setattr__(self, "segment", (self.stride, self.stride))
        super().__post_init__()

    def similarity(self, layer: LayerCache, q: Tensor) -> Tensor:
        similarity = super().similarity(layer, q)  # -inf in the first step
        if layer.cache.steps % self.stride == 0:
            return torch.full_like(similarity, -torch.inf)
        return similarity.where(similarity == -torch.inf, 0.0)

    @property
    def cut_below(self) -> float:
        return NEVER

    @property
    def retrieve_below(self) -> float:
        return -1.0
