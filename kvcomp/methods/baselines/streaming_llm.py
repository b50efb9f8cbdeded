"""StreamingLLM: attention sinks and a sliding window (arXiv 2309.17453).

Keeps the first tokens and the newest ones, and counts positions within the cache. For that the
released code rotates all keys again at every step. Rotary attention depends on distances only, and
the distances within the window are already right. So this version moves the few sinks along with
the window and rotates nothing else. The result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._sinks import SinkEviction


@dataclass(frozen=True)
class StreamingLLM(SinkEviction, name="streaming-llm", baseline=True):
    """Keeps a window, with the sinks at the positions right before it."""

    def evict(self, layer: LayerCache) -> None:
        if layer.max_len > self.budget:
            super().evict(layer)
            evicted = layer.logical_lens - layer.seq_lens
            self.move_sinks(layer, evicted[:, None].expand(-1, self.sinks))
