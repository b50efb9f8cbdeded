"""RaaS: reasoning-aware attention sparsity (arXiv 2502.11147).

Each token is stamped with the last step in which it was important. The tokens with the oldest
stamps are evicted, and the whole prompt stays. This is the first half of LazyEviction: least
recently hit, without intervals. Deviations: single tokens instead of pages of 16; exact
probabilities instead of estimates from representative keys; a token is important if its probability
reaches alpha, the fixed form of the paper's rule; one set per KV head, because the paper does not
specify heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import EXAMPLE_ALPHA, EXAMPLE_BUDGET, RecurrenceEviction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class RaaS(RecurrenceEviction, name="raas", baseline=True):
    """The score of a token is minus the number of steps since its last hit."""

    keep_prompt: bool = True

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """Evicts at every step."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        return cls(budget=budget - 1, alpha=EXAMPLE_ALPHA)

    @property
    def num_recent(self) -> int:
        return 1  # the newest token has not had its chance

    def score(self, layer: LayerCache) -> Tensor:
        last_hit = layer.slots["last_hit"][..., : layer.max_len]
        return (last_hit - layer.cache.steps).float()
