"""LessIsMore: one token set for all heads, and a share of it for the newest (arXiv 2508.07101).

As TidalDecode, but the selecting layer merges the rankings of all query heads: every head's best
token, then every head's second, and so on, until the set is full; a quarter of it is the newest
tokens. All heads of the layers that follow attend to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.view import Layer
from kvcomp.methods.baselines._shared_tokens import SharedTokens


@dataclass(frozen=True)
class LessIsMore(SharedTokens, name="less-is-more", baseline=True):
    """Tokens by their best rank under any head.

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
