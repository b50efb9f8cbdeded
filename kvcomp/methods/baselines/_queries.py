"""Scores from the latest queries: SnapKV's importance, which R-KV also uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods import alike
from kvcomp.methods.eviction import EXAMPLE_BUDGET, EXAMPLE_WINDOW, Eviction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LastQueries(Eviction):
    """Keeps the latest queries and scores older tokens by them.

    Attributes:
        recent: newest tokens, which always stay and whose queries give the scores.
    """

    window: int = 128
    recent: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.recent >= 1, "recent", "at least 1 token")

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens at any time."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        window = min(EXAMPLE_WINDOW, budget // 4)
        return cls(budget=budget - window, window=window, recent=min(8, budget // 4))

    @property
    def num_recent(self) -> int:
        return self.recent

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        q, valid = q.detach(), layer.seen()[:, -q.shape[2] :]
        if "queries" in layer.state:
            earlier = layer.state["queries"]
            q = torch.cat([earlier, q], 2)
            valid = torch.nn.functional.pad(valid, (earlier.shape[2], 0), value=True)
        newest = valid.int().argsort(dim=1, stable=True)[:, -self.recent :]  # padding comes first
        index = newest[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        layer.state["queries"] = q.gather(2, index)  # [B, Hq, recent, D]

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        self._remember(layer, q.detach())
        return super().attend(layer, q, scale)

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        layer.drafts["queries"] = q.detach().transpose(1, 2)
        return super().verify(layer, q, scale)

    def accept(self, layer: LayerCache, index: int) -> None:
        self._remember(layer, layer.drafts["queries"][:, index])

    def _remember(self, layer: LayerCache, q: Tensor) -> None:
        queries = torch.cat([layer.state["queries"], q[:, :, None]], 2)
        layer.state["queries"] = queries[:, :, -self.recent :]

    def importance(self, layer: LayerCache, kernel: int) -> Tensor:
        """[B, U, max_len]: probabilities among the tokens older than the newest `recent`."""
        positions = layer.positions(self.num_units(layer))
        grouped = layer.state["queries"].unflatten(1, (layer.kv_heads, -1))
        logits = alike.dots(grouped, layer.keys[:, :, None]).flatten(1, 2)  # [B, Hq, w, max_len]
        logits = logits.unflatten(1, (positions.shape[1], -1)).amax(2)
        logits = logits * layer.scale
        older = positions < (layer.logical_lens - self.recent)[:, None, None]
        older &= valid_slots(layer)
        probs = alike.softmax(logits.masked_fill(~older[:, :, None], -torch.inf)).nan_to_num(0.0)
        mean = alike.total(probs, 2) / probs.shape[2]
        return smooth(mean, positions, valid_slots(layer), kernel)


def valid_slots(layer: LayerCache) -> Tensor:
    """[B, 1, max_len] bool."""
    slot = torch.arange(layer.max_len, device=layer.seq_lens.device)
    return slot < layer.seq_lens[:, None, None]


def text_order(positions: Tensor, valid: Tensor) -> Tensor:
    """[B, U, max_len] int64: slots from the oldest token to the newest, then the unused ones."""
    return positions.masked_fill(~valid, torch.iinfo(torch.int32).max).argsort(-1)


def smooth(scores: Tensor, positions: Tensor, valid: Tensor, kernel: int) -> Tensor:
    """The maximum over `kernel` neighbours in the text, half of them on each side."""
    order = text_order(positions, valid)
    pooled = torch.nn.functional.max_pool1d(
        scores.gather(-1, order), kernel, stride=1, padding=kernel // 2
    )
    return torch.empty_like(scores).scatter_(-1, order, pooled[..., : scores.shape[-1]])
