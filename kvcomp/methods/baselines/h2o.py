"""H2O: the heavy hitters (arXiv 2306.14048).

Keeps the newest tokens, and the tokens that have received the most attention in total, including
from the prompt's own queries. The paper has one set per query head, evicts at every step and gives
half of the budget to the newest tokens. Deviations: the default is one set per KV head, which sums
the probabilities of its query heads. The budget is in tokens; the released code takes shares of the
prompt's length. Evicted tokens leave memory; the released code masks them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods import alike
from kvcomp.methods.baselines._prompt import prompt_probabilities
from kvcomp.methods.eviction import ObservingEviction


@dataclass(frozen=True)
class H2O(ObservingEviction, name="h2o", baseline=True):
    """The score of a token is the sum of its attention probabilities so far.

    Attributes:
        recent: newest tokens that always stay; None: half of the budget.
    """

    recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.num_recent >= 0, "recent", "at least 0 tokens, or None")

    @property
    def num_recent(self) -> int:
        return self.budget // 2 if self.recent is None else self.recent

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        if "total" not in layer.slots:
            layer.track("total", self.num_units(layer), torch.float32)
        total = layer.slots["total"]
        for probs in prompt_probabilities(layer, q):  # [B, Hq, queries, max_len]
            heads = alike.total(probs, 2).unflatten(1, (total.shape[1], -1))
            total[..., : layer.max_len] += alike.total(heads, 2)

    def measure(self, layer: LayerCache, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        return self.probabilities(layer, logits, lse, lens)

    def record(self, layer: LayerCache, note: Tensor) -> None:
        layer.slots["total"][..., : layer.max_len] += note[..., : layer.max_len]

    def score(self, layer: LayerCache) -> Tensor:
        return layer.slots["total"][..., : layer.max_len]
