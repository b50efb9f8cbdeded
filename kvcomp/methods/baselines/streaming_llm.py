"""StreamingLLM: attention sinks and a sliding window (arXiv 2309.17453).

Keeps the first tokens and the newest ones, and counts positions within the cache. The released
code rotates all keys anew at every step for that. Rotary attention sees distances only, and those
within the window are right as they are: so here the few sinks follow the window, and nothing else
is rotated. The result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._sinks import SinkEviction


@dataclass(frozen=True)
class StreamingLLM(SinkEviction, name="streaming-llm", baseline=True):
    """Sinks that stand right before the window."""

    def evict(self, layer: LayerCache) -> None:
        if layer.max_len > self.budget:
            super().evict(layer)
            evicted = layer.logical_lens - layer.seq_lens
            self.move_sinks(layer, evicted[:, None].expand(-1, self.sinks))
