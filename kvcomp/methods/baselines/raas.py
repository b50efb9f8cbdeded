"""RaaS: reasoning-aware attention sparsity (arXiv 2502.11147).

A token is stamped with the step in which it was last important; the oldest stamps leave, and the
whole prompt stays. It is the first half of LazyEviction: least recently hit, with no intervals.
Deviations: single tokens instead of pages of 16, and exact probabilities instead of estimates from
representative keys; important is what reaches alpha, the fixed form of the paper's rule; a set per
KV head, as the paper's notes say nothing about heads.
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
    """Score: the step of the last hit, seen from now."""

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
