"""RandomPages: random pages instead of chosen ones; what a score must beat.

Same shape as layer-aware sparse attention: the dense layers read everything, the others one page
set per step, drawn uniformly, the newest pages included. Saves exactly what DELTA saves at the same
budget and dense layers, so that a difference in accuracy is the score's own merit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.view import Cache, Layer
from kvcomp.methods.base import Method
from kvcomp.methods.cost import Place, StepBytes

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class RandomPages(Method, name="random-pages", baseline=True):
    """Uniformly random pages, drawn anew every step.

    Attributes:
        budget: tokens that a sparse layer attends to, the recent pages included.
        page_size: tokens in a page.
        recent: newest pages always in the set.
        dense_layers: layers that read everything.
        seed: of the draw; a cache started anew repeats it.
    """

    budget: int = 1024
    page_size: int = 16
    recent: int = 8
    dense_layers: tuple[int, ...] = (0, 1, 2)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.page_size >= 1, "page_size", "at least 1 token")
        pages, rest = divmod(self.budget, self.page_size)
        self._require(not rest, "budget", f"a multiple of page_size={self.page_size}")
        self._require(1 <= self.recent <= pages, "recent", f"1 to {pages} pages")

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """Pages of 4 and two recent pages, for short contexts; the dense layers are DELTA's."""
        return cls(budget=128 if budget is None else budget, page_size=4, recent=2)

    def check(self, num_layers: int) -> None:
        inside = all(0 <= x < num_layers for x in self.dense_layers)
        self._require(inside, "dense_layers", f"layers in 0..{num_layers - 1}")

    @property
    def dense_up_to(self) -> float:
        return self.budget

    def step_bytes(self, at: Place) -> StepBytes:
        if at.seen <= self.budget:
            return super().step_bytes(at)
        dense, pages = len(set(self.dense_layers)), self.budget // self.page_size
        sparse, selected = at.layers - dense, self.budget - -at.seen % self.page_size
        return StepBytes(
            read=(dense * at.seen + sparse * selected) * at.token_bytes,
            held=at.seen * at.layers * at.token_bytes,
            scoring=sparse * 4 * pages,
        )

    def start(self, cache: Cache) -> None:
        cache.state.generator = torch.Generator().manual_seed(self.seed)
        cache.state.pages = None
        cache.state.step = -1
        for layer in cache.layers:
            layer.shared_sets = layer.position not in self.dense_layers

    def attend(self, layer: Layer, q: Tensor, scale: float) -> Tensor:
        if layer.position in self.dense_layers or layer.max_len <= self.budget:
            return layer.attend(q, scale)[0]
        cache, state = layer.cache, layer.cache.state
        if state.step != cache.steps:
            state.step, state.pages = cache.steps, self._draw(layer, state.generator)
        page_ids, lens = state.pages
        return layer.attend(q, scale, page_ids=page_ids, page_size=self.page_size, seq_lens=lens)[0]

    def _draw(self, layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pages = -(-layer.max_len // self.page_size)
        scores = torch.rand(layer.seq_lens.shape[0], 1, pages, generator=generator)
        return ops.select_pages(
            scores.to(layer.seq_lens.device),
            layer.seq_lens,
            self.page_size,
            self.budget // self.page_size,
            num_recent=self.recent,
        )
