"""Retrieval of clusters of the prompt and segments of the output, at any frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvcomp import ops
from kvcomp.methods.retrieval import Retrieval
from kvcomp.ops.kmeans import num_clusters

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ClusteredRetrieval(Retrieval):
    """Clusters the prompt's keys per KV head and ends a segment of the output when queries turn.

    Attributes:
        tau: a segment ends when a step's queries are less similar to the previous ones than this.
        cluster_size: mean number of tokens in a cluster of the prompt.
        window: tokens of the prompt that are clustered together.
        iterations: iterations of the clustering.
    """

    dense_layers: int = 0
    tau: float = 0.85
    cluster_size: int = 16
    window: int = 8192
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(-1 <= self.tau <= 2, "tau", "a number from -1 to 2")
        self._require(self.cluster_size >= 1, "cluster_size", "at least 1 token")
        self._require(
            self.window >= self.cluster_size,
            "window",
            f"at least cluster_size={self.cluster_size} tokens",
        )
        self._require(self.iterations >= 1, "iterations", "at least 1")

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens on the device, for short contexts and few layers."""
        fields = cls.shares(128 if budget is None else budget)
        return cls(**fields, cluster_size=4, dense_layers=1)

    @property
    def unit_size(self) -> int:
        return self.cluster_size

    def unit_count(self, tokens: int) -> int:
        return num_clusters(tokens, self.cluster_size, self.window)

    def units(self, keys: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.kmeans(
            keys,
            first,
            last,
            cluster_size=self.cluster_size,
            window=self.window,
            iterations=self.iterations,
        )

    @property
    def cut_below(self) -> float:
        return self.tau
