"""TidalDecode: two layers select the tokens for the layers above them (arXiv 2410.05076).

The first layers attend to everything. A token selection layer also attends to everything and
selects the most probable tokens per KV head. The layers above it attend to these tokens, until a
layer in the middle selects again. Tokens are selected at every step. Difference: the heads of a
group share a set, selected by the sum of their probabilities, because K and V are stored once per
KV head (native GQA).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomp import ops
from kvcomp.cache.view import Layer
from kvcomp.methods.baselines._shared_tokens import SharedTokens


@dataclass(frozen=True)
class TidalDecode(SharedTokens, name="tidal-decode", baseline=True):
    """Selects the most probable tokens, one set per KV head.

    Attributes:
        recent: newest tokens always in the set.
    """

    recent: int = 1

    @property
    def num_recent(self) -> int:
        return self.recent

    def score(self, layer: Layer, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        groups = layer.kv_heads
        return ops.page_scores(logits, lse, lens, 1, num_groups=groups, reduction="sum")
