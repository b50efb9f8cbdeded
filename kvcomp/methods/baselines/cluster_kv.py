"""ClusterKV: large clusters of prompt and output, selected at every step (arXiv 2412.03213).

The prompt is clustered as a whole, with about 80 tokens per cluster. After every 320 tokens of
output, these are clustered into 8 clusters. Differences: the heads of a group share a set
(ClusterKV has one set per query head and therefore stores K and V once per query head), keys are
centred, and clusters compete by softmax, as in all clustered methods here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.clustered import ClusteredRetrieval
from kvcomp.methods.retrieval import NEVER
from kvcomp.ops.kmeans import num_clusters

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ClusterKV(ClusteredRetrieval, name="cluster-kv", baseline=True):
    """Retrieves clusters of prompt and output; `tau` has no effect.

    Attributes:
        output_window: tokens of output that are clustered together.
        output_cluster: mean number of tokens in these clusters.
    """

    local: int = 320
    dense_layers: int = 2
    cluster_size: int = 80
    window: int = 2**30  # all of a prompt
    iterations: int = 20
    output_window: int = 320
    output_cluster: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.output_window >= 1, "output_window", "at least 1")
        self._require(self.output_cluster >= 1, "output_cluster", "at least 1")
        object.__setattr__(self, "segment", (self.output_window, self.output_window))

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens on the device, for short contexts and few layers."""
        fields = cls.shares(128 if budget is None else budget)
        window = fields["segment"][1]
        return cls(**fields, cluster_size=8, output_window=window, output_cluster=4, dense_layers=1)

    @property
    def cut_below(self) -> float:
        return NEVER

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        if layer.is_hosted:
            layer.state["prompt_units"] = layer.hosted.index.num_units.clone()

    def select(self, layer: LayerCache, q: Tensor, scale: float, active: Tensor) -> None:
        # A window's clusters end at other rows in other heads, so they leave all together.
        prompt, indexed = layer.state["prompt_units"], layer.hosted.index.num_indexed
        size = num_clusters(self.output_window, self.output_cluster, self.output_window)
        windows = -(-(indexed - prompt).clamp(min=0) // size)
        torch.maximum(indexed, (prompt + windows * size).where(windows > 0, 0), out=indexed)
        super().select(layer, q, scale, active)

    def store(self, layer: LayerCache, closed: Tensor) -> None:
        index = layer.hosted.index
        index.reserve(num_clusters(int(closed.max()), self.output_cluster, self.output_window))
        super().store(layer, closed)
        for row in closed.nonzero().flatten().tolist():
            self._cluster(layer, row)

    def _cluster(self, layer: LayerCache, row: int) -> None:
        """Split the newest unit of a row into clusters, in the pool, the index and the slots."""
        index, unit = layer.hosted.index, int(layer.hosted.index.num_units[row]) - 1
        begin, end = index.starts[row, 0, unit : unit + 2].tolist()
        rows = layer.hosted.pool.read(row, begin, end)
        keys, _ = layer.decoded(rows)
        bounds = torch.tensor([[0], [end - begin]], dtype=torch.int32, device=keys.device)
        labels, digests, sizes = ops.kmeans(
            keys[None],
            *bounds,
            cluster_size=self.output_cluster,
            window=self.output_window,
            iterations=self.iterations,
        )
        order = labels[0].argsort(dim=-1, stable=True)  # [Hkv, tokens]
        layer.hosted.pool.write(row, begin, rows.take(order, 1))
        index.write(row, unit, digests[0], sizes[0])
        index.num_units[row] += sizes.shape[-1] - 1
        moved = begin + order.argsort(-1).int()  # [Hkv, tokens], where each row is now
        held = layer.slots["position"][row]
        here = (held >= begin) & (held < end)
        held.copy_(
            torch.where(
                here, moved.gather(-1, (held - begin).clamp(0, end - begin - 1).long()), held
            )
        )
