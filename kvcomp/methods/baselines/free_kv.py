"""FreeKV: pages selected one step ahead, corrected where the queries turn (arXiv 2505.13109).

A step attends to what the step before it selected, so that the link works beside the computation;
only where the mean cosine of successive queries is below tau does it select for itself, and wait.
Differences: the decision is the layer's (FreeKV's is each KV head's), and no transfer is hidden
here: what is measured is which tokens are attended and how many bytes cross the link.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomp import ops
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._pages import PagedRetrieval


@dataclass(frozen=True)
class FreeKV(PagedRetrieval, name="free-kv", baseline=True):
    """Min-max pages, selected with the query before.

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
