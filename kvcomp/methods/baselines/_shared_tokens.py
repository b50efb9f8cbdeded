"""Token sets that a few dense layers select for the layers above them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
class SharedTokens(Method):
    """Some layers attend to everything. The others attend to the tokens that these selected.

    Attributes:
        budget: tokens that a sparse layer attends to, the recent ones included.
        dense_layers: number of first layers, which attend to everything and select nothing; None:
            those below the first of `selecting`, or without these 2, but at most a quarter of the
            layers.
        selecting: layers that attend to everything and select; the first must directly follow the
            dense layers. None: that layer and the middle layer, if layers between them and above
            can use what they select.
    """

    budget: int = 1024
    dense_layers: int | None = None
    selecting: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        dense = self.dense_layers
        self._require(dense is None or dense >= 0, "dense_layers", "at least 0, or None")
        fits = 1 <= self.num_recent <= self.budget
        self._require(fits, "recent", f"1 to budget={self.budget} tokens")

    @property
    def num_recent(self) -> int:
        """Newest tokens always in the set."""
        raise NotImplementedError

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """For short contexts and few layers."""
        return cls(budget=128 if budget is None else budget, selecting=(2,))

    def num_dense(self, num_layers: int) -> int:
        """The number of first layers that select nothing, of `num_layers` layers."""
        if self.dense_layers is not None:
            return self.dense_layers
        return min(self.selecting) if self.selecting else default_warmup(num_layers)

    def plan(self, num_layers: int) -> tuple[int, ...]:
        """The selecting layers in a model of `num_layers` layers."""
        if self.selecting is not None:
            return tuple(sorted(self.selecting))
        first, middle = self.num_dense(num_layers), num_layers // 2
        return (first, middle) if first + 2 <= middle < num_layers - 1 else (first,)

    def check(self, num_layers: int) -> None:
        plan = self.plan(num_layers)
        first = self.num_dense(num_layers)
        self._require(
            bool(plan) and 0 <= plan[0] == first and plan[-1] < num_layers,
            "selecting",
            f"layers from dense_layers={first}, which must select, up to {num_layers - 1}",
        )

    @property
    def dense_up_to(self) -> float:
        return self.budget

    def step_bytes(self, at: Place) -> StepBytes:
        if at.seen <= self.budget:
            return super().step_bytes(at)
        selecting = len(self.plan(at.layers))
        sparse = at.layers - self.num_dense(at.layers) - selecting
        read = (at.layers - sparse) * at.seen + sparse * self.budget
        return StepBytes(
            read=read * at.token_bytes,
            held=at.seen * at.layers * at.token_bytes,
            scoring=selecting * at.seen * at.logit_bytes + sparse * 4 * self.budget,
        )

    def start(self, cache: Cache) -> None:
        cache.state.dense = self.num_dense(len(cache.layers))
        cache.state.selecting = frozenset(self.plan(len(cache.layers)))
        cache.state.tokens = None  # (token ids [B, 1 or Hkv, K], lens [B]) of this step

    def score(self, layer: Layer, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        """The score of each token for queries that see lens [R] tokens: [R, 1 or Hkv, n] fp32, from
        logits [R, Hq, n] and lse [R, Hq]. High scores are selected."""
        raise NotImplementedError

    def attend(self, layer: Layer, q: Tensor, scale: float) -> Tensor:
        state = layer.cache.state
        if layer.max_len <= self.budget or layer.position < state.dense:
            return layer.attend(q, scale)[0]
        if layer.position not in state.selecting:
            ids, lens = (x.to(q.device) for x in state.tokens)
            return layer.attend(q, scale, page_ids=ids, page_size=1, seq_lens=lens)[0]
        logits = layer.cache.logits_for(layer, q)
        out, lse = layer.attend(q, scale, logits=logits)
        state.tokens = self._chosen(layer, logits[:, :, : layer.max_len], lse, layer.seq_lens)
        return out

    def _chosen(
        self, layer: Layer, logits: Tensor, lse: Tensor, lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = self.score(layer, logits, lse, lens)
        return ops.select_pages(scores, lens, 1, self.budget, num_recent=self.num_recent)

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        state, tokens = layer.cache.state, layer.max_len + layer.staged
        if tokens <= self.budget or layer.position < state.dense:
            return super().verify(layer, q, scale)
        if layer.position not in state.selecting:
            return layer.attend_apart(q, scale, *state.tokens, page_size=1)
        logits = layer.cache.staged_logits_for(layer, q)
        out, lse = layer.attend_staged(q, scale, logits=logits)
        lens = layer.staged_lens()
        each = logits[..., :tokens].flatten(0, 1), lse.flatten(0, 1), lens.flatten()
        state.tokens = tuple(x.unflatten(0, lens.shape) for x in self._chosen(layer, *each))
        return out
