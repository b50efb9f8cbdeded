"""RandomEviction: evicts random tokens. Every score must beat it.

It uses as much memory as the other eviction methods and no information. The newest tokens stay.
With `keep_prompt=True` it is the "pin the question" baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import EXAMPLE_BUDGET, Eviction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class RandomEviction(Eviction, name="random-eviction", baseline=True):
    """Scores are uniform noise, drawn at every eviction.

    Attributes:
        recent: newest tokens that always stay.
        seed: seed of the draws; a new or reset cache repeats them.
    """

    recent: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.recent >= 0, "recent", "at least 0 tokens")

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """Evicts at every step; the newest tokens take an eighth of the budget."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        return cls(budget=budget - 1, recent=budget // 8)

    @property
    def num_recent(self) -> int:
        return self.recent

    def start(self, cache: KVCache) -> None:
        super().start(cache)
        cache.state.generator = torch.Generator().manual_seed(self.seed)

    def score(self, layer: LayerCache) -> Tensor:
        shape = (len(layer.seq_lens), self.num_units(layer), layer.max_len)
        return torch.rand(shape, generator=layer.cache.state.generator).to(layer.seq_lens.device)
