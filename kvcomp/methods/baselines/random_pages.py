"""RandomPages: attends to random pages. Every page score must beat it.

It has the shape of layer-aware sparse attention. The dense layers read everything. The other layers
read one page set per step, which holds the newest pages and uniformly drawn ones. With the same
budget and dense layers it saves exactly as much as DELTA, so a difference in accuracy is due to the
score alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.view import Cache, Layer
from kvcomp.methods.base import Method
from kvcomp.methods.cost import Place, StepBytes
from kvcomp.methods.depth import default_warmup

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvcomp.cache.layer import LayerCache


@dataclass(frozen=True)
class RandomPages(Method, name="random-pages", baseline=True):
    """Uniformly random pages, drawn at every step.

    Attributes:
        budget: tokens that a sparse layer attends to, the recent pages included.
        page_size: tokens in a page.
        recent: newest pages always in the set.
        dense_layers: layers that read everything; None: the first 3, but at most a quarter of the
            layers and one more, as many as DELTA's warm-up and its first delta layer.
        seed: seed of the draws; a new or reset cache repeats them.
    """

    budget: int = 1024
    page_size: int = 8
    recent: int = 8
    dense_layers: tuple[int, ...] | None = None
    seed: int = 0

    in_step: ClassVar[bool] = True  # one generator draws for all rows

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

    def dense(self, num_layers: int) -> frozenset[int]:
        """The layers that read everything, of `num_layers` layers."""
        if self.dense_layers is not None:
            return frozenset(self.dense_layers)
        return frozenset(range(default_warmup(num_layers) + 1))

    def check(self, num_layers: int) -> None:
        inside = all(0 <= x < num_layers for x in self.dense(num_layers))
        self._require(inside, "dense_layers", f"layers in 0..{num_layers - 1}")

    @property
    def dense_up_to(self) -> float:
        return self.budget

    def step_bytes(self, at: Place) -> StepBytes:
        if at.seen <= self.budget:
            return super().step_bytes(at)
        dense, pages = len(self.dense(at.layers)), self.budget // self.page_size
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
        cache.state.ahead = None  # pages of the drafts, by draft
        cache.state.dense = self.dense(len(cache.layers))
        for layer in cache.layers:
            layer.shared_sets = layer.position not in cache.state.dense

    def attend(self, layer: Layer, q: Tensor, scale: float) -> Tensor:
        if layer.position in layer.cache.state.dense or layer.max_len <= self.budget:
            return layer.attend(q, scale)[0]
        self._draw_once(layer)
        page_ids, lens = layer.cache.state.pages
        return layer.attend(q, scale, page_ids=page_ids, page_size=self.page_size, seq_lens=lens)[0]

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        tokens, state = layer.max_len + layer.staged, layer.cache.state
        if layer.position in state.dense or tokens <= self.budget:
            return super().verify(layer, q, scale)
        if state.ahead is None:
            generator = torch.Generator().set_state(state.generator.get_state())
            draws = [
                self._draw(lens, layer.max_len + index + 1, generator)
                for index, lens in enumerate(layer.staged_lens().unbind(1))
            ]
            width = max(ids.shape[2] for ids, _ in draws)
            padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[2])) for ids, _ in draws]
            state.ahead = torch.stack(padded, 1), torch.stack([lens for _, lens in draws], 1)
        return layer.attend_apart(q, scale, *state.ahead, page_size=self.page_size)

    def accept(self, layer: LayerCache, index: int) -> None:
        if layer.position not in layer.cache.state.dense:
            self._draw_once(layer)

    def end_verify(self, cache: Cache) -> None:
        cache.state.ahead = None

    def _draw_once(self, layer: Layer) -> None:
        """In the first sparse layer of a step that leaves something out."""
        cache, state = layer.cache, layer.cache.state
        if layer.max_len > self.budget and state.step != cache.steps:
            state.step = cache.steps
            state.pages = self._draw(layer.seq_lens, layer.max_len, state.generator)

    def _draw(
        self, lens: Tensor, longest: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """No draw changes the generator where nothing is left out."""
        pages = -(-longest // self.page_size)
        if longest <= self.budget:
            scores = torch.zeros(len(lens), 1, pages)
        else:
            scores = torch.rand(len(lens), 1, pages, generator=generator)
        return ops.select_pages(
            scores.to(lens.device),
            lens.contiguous(),
            self.page_size,
            self.budget // self.page_size,
            num_recent=self.recent,
        )
