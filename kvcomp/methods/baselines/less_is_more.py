"""LessIsMore: one token set for all heads, with a share for the newest (arXiv 2508.07101).

It works like TidalDecode, but the selecting layer merges the rankings of all query heads: it takes
the best token of every head, then the second of every head, and so on, until the set is full. A
quarter of the set is reserved for the newest tokens. All heads of the following layers attend to
this set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.view import Layer
from kvcomp.methods.baselines._shared_tokens import SharedTokens


@dataclass(frozen=True)
class LessIsMore(SharedTokens, name="less-is-more", baseline=True):
    """Selects tokens by their best rank under any head.

    Attributes:
        recent: newest tokens always in the set; None: a quarter of the budget.
    """

    recent: int | None = None

    @property
    def num_recent(self) -> int:
        return max(1, self.budget // 4) if self.recent is None else self.recent

    def score(self, layer: Layer, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        slot = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(slot >= lens[:, None, None], -torch.inf)
        order = logits.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, slot.expand_as(order).contiguous())
        return -rank.amin(1, keepdim=True).float()
