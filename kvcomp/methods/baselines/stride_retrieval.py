"""StrideRetrieval: clustered retrieval at a fixed number of steps, independent of the queries.

LouisKV's adaptive trigger must beat it at equal link bytes. Segments of the output are as long as
the stride, and a row selects again at the end of each segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.clustered import ClusteredRetrieval
from kvcomp.methods.retrieval import NEVER

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class StrideRetrieval(ClusteredRetrieval, name="stride-retrieval", baseline=True):
    """Clustered retrieval at a fixed stride; `tau` has no effect.

    Attributes:
        stride: steps from one retrieval to the next.
    """

    stride: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.stride >= 1, "stride", "at least 1 step")
        object.__setattr__(self, "segment", (self.stride, self.stride))

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens on the device, for short contexts and few layers."""
        fields = cls.shares(128 if budget is None else budget)
        stride = fields["segment"][1]
        return cls(**fields, stride=stride, cluster_size=4, dense_layers=1)

    def similarity(self, layer: LayerCache, q: Tensor) -> Tensor:
        similarity = super().similarity(layer, q)  # -inf in the first step
        open_tokens = layer.logical_lens - 1 - layer.hosted.index.first_open()
        due = (similarity == -torch.inf) | (open_tokens >= self.stride)
        return torch.where(due, -torch.inf, 0.0)

    @property
    def cut_below(self) -> float:
        return NEVER

    @property
    def retrieve_below(self) -> float:
        return -1.0

    @property
    def selection_rate(self) -> float:
        return 1 / self.stride
