"""SnapKV at decode time: keeps the tokens that the latest queries attend to (arXiv 2404.14469).

The original SnapKV compresses a prompt once. This is its form as a decoding baseline: every 128
steps the newest 8 tokens stay, and their queries score the others; the scores are smoothed over
neighbouring tokens. Deviation: neighbours are taken from the text; the released code takes them
from memory, which is the same only before the first eviction.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.baselines._queries import LastQueries


@dataclass(frozen=True)
class SnapKV(LastQueries, name="snapkv", baseline=True):
    """The score takes logits as max over a unit's heads, their softmax over the older tokens, and
    the mean over queries, then smooths it.

    Attributes:
        kernel: number of neighbouring tokens whose maximum is taken.
    """

    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.kernel >= 1, "kernel", "at least 1 token")

    def score(self, layer: LayerCache) -> Tensor:
        return self.importance(layer, self.kernel)
