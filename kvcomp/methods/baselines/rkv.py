"""R-KV: redundancy-aware eviction for reasoning models (arXiv 2505.24133).

The score is the attention of the latest queries minus the redundancy of the key. Tokens whose keys
resemble many others are evicted, but the newest of several near duplicates does not count against
the older ones. It evicts every 128 steps, and the newest 8 tokens stay. An eviction compares all
pairs of tokens, which takes O(m^2). Deviation: "newest" and "neighbour" refer to the order of the
text; the released code uses the order in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods import alike
from kvcomp.methods.baselines._queries import LastQueries, text_order, valid_slots


@dataclass(frozen=True)
class RKV(LastQueries, name="r-kv", baseline=True):
    """The score of a token is lambda * importance - (1 - lambda) * redundancy.

    Attributes:
        kernel: number of neighbouring tokens over which the importance is smoothed.
        trade_off: lambda; 0.1 in the paper, 0.07 in the released code.
        similar: cosine above which two keys count as duplicates.
    """

    kernel: int = 7
    trade_off: float = 0.1
    similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.kernel >= 1, "kernel", "at least 1 token")
        self._require(0 <= self.trade_off <= 1, "trade_off", "0 to 1")
        self._require(-1 <= self.similar <= 1, "similar", "a cosine, -1 to 1")

    def score(self, layer: LayerCache) -> Tensor:
        importance = self.importance(layer, self.kernel)
        return self.trade_off * importance - (1 - self.trade_off) * self.redundancy(layer)

    def redundancy(self, layer: LayerCache) -> Tensor:
        """[B, U, max_len]: the softmax over tokens of their mean cosine with all others."""
        positions, valid = layer.positions(self.num_units(layer)), valid_slots(layer)
        order = text_order(positions, valid)  # [B, U, m]
        units, heads = order.shape[1], layer.kv_heads
        index = order.repeat_interleave(heads // units, 1)[..., None]
        keys = layer.keys.float().gather(2, index.expand(-1, -1, -1, layer.keys.shape[-1]))
        keys = keys / alike.total(keys.square(), -1).sqrt().clamp(min=1e-12)[..., None]
        used = valid.gather(2, order[:, :1]).expand(-1, heads, -1)  # [B, H, m], in text order
        cosine = alike.dots(keys, keys) * (used[..., None] & used[..., None, :])
        cosine.diagonal(dim1=-2, dim2=-1).zero_()
        place = torch.arange(cosine.shape[-1], device=cosine.device)
        newest = torch.where(cosine > self.similar, place, -1).amax(-1, keepdim=True)
        cosine.masked_fill_(place == newest, 0.0)
        mean = alike.exact_total(cosine, -2) / used.sum(-1, keepdim=True)
        scores = alike.softmax(mean.masked_fill(~used, -torch.inf)).unflatten(1, (units, -1))
        scores = alike.total(scores, 2) / (heads // units)
        return torch.empty_like(scores).scatter_(-1, order, scores)
