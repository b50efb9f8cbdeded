"""FreeKV: pages selected one step ahead, corrected where the queries turn (arXiv 2505.13109).

A step attends to the pages that the previous step selected, so that transfers can overlap with
computation. If the mean cosine of successive queries is below tau, the step selects for itself and
waits. Differences: each layer decides as a whole (in FreeKV each KV head decides), and transfers do
not overlap with anything here. Only the attended tokens and the bytes over the link are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomp import ops
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._pages import PagedRetrieval


@dataclass(frozen=True)
class FreeKV(PagedRetrieval, name="free-kv", baseline=True):
    """Min-max pages, selected with the query of the previous step.

    Attributes:
        tau: similarity below which a step selects for itself.
    """

    page_size: int = 32
    tau: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(-1 <= self.tau <= 2, "tau", "a number from -1 to 2")

    def similarity(self, layer: LayerCache, q: Tensor) -> Tensor:
        layer.state["similarity"] = ops.query_similarity(q, layer.state["query"])
        return layer.state["similarity"]

    @property
    def retrieve_below(self) -> float:
        return self.tau

    def look_ahead(self, layer: LayerCache, q: Tensor, scale: float) -> None:
        if layer.is_hosted:
            ahead = layer.state["similarity"] >= self.tau
            self.select(layer, q, scale, ahead.int())
