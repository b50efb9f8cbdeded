"""LM-Infinite: a lambda-shaped mask and limited distances (arXiv 2308.16137).

Attends to the first tokens and to the newest `budget - sinks` tokens. No distance exceeds the
window: each of the first tokens is moved to that distance at every step. In the paper the window is
the length that the model was trained on. Deviations: a row stays dense up to the budget; if
evictions are more than one step apart, tokens beyond the window stay visible until the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._sinks import SinkEviction


@dataclass(frozen=True)
class LMInfinite(SinkEviction, name="lm-infinite", baseline=True):
    """Keeps a window, and the first tokens at a limited distance."""

    sinks: int = 10

    @property
    def farthest(self) -> int:
        """The largest distance; it replaces all larger ones."""
        return self.budget - self.sinks

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        if layer.max_len > self.budget:
            own = torch.arange(self.sinks, device=layer.seq_lens.device)
            seen = layer.logical_lens[:, None]
            shift = (seen - 1 - own - self.farthest).clamp(min=0)  # [B, sinks]
            self.move_sinks(layer, torch.where(seen > self.budget, shift, 0))
        return super().attend(layer, q, scale)
