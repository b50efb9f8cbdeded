"""SnapKV at decode time: what the latest queries attend to (arXiv 2404.14469).

SnapKV proper compresses a prompt once; this is the form that decoding baselines use: every 128
steps, the newest 8 tokens stay, and their queries judge the others, the scores smoothed over
neighbours. Deviation: neighbours are those in the text, where the released code takes those in
memory, which are the same only before the first eviction.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._queries import LastQueries


@dataclass(frozen=True)
class SnapKV(LastQueries, name="snapkv", baseline=True):
    """Score: max over a unit's heads, softmax over the older tokens, mean over queries, smoothed.

    Attributes:
        kernel: tokens over which the maximum is taken.
    """

    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.kernel >= 1, "kernel", "at least 1 token")

    def score(self, layer: LayerCache) -> Tensor:
        return self.importance(layer, self.kernel)
