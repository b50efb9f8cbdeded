"""LM-Infinite: a lambda-shaped mask and a limit on distances (arXiv 2308.16137).

Attends to the first tokens and to the newest `budget - sinks`, and no distance counts as more than
the window: each of the first tokens stands at that same distance, moved anew at every step. The
paper takes the length that the model was trained on for the window. Deviations: a row stays dense
up to the budget; where evictions are more than one step apart, tokens beyond the window are
attended to until then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._sinks import SinkEviction


@dataclass(frozen=True)
class LMInfinite(SinkEviction, name="lm-infinite", baseline=True):
    """First tokens at a limited distance, and a window."""

    sinks: int = 10

    @property
    def farthest(self) -> int:
        """The distance that stands for all larger ones."""
        return self.budget - self.sinks

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        if layer.max_len > self.budget:
            own = torch.arange(self.sinks, device=layer.seq_lens.device)
            seen = layer.logical_lens[:, None]
            shift = (seen - 1 - own - self.farthest).clamp(min=0)  # [B, sinks]
            self.move_sinks(layer, torch.where(seen > self.budget, shift, 0))
        return super().attend(layer, q, scale)
