"""TidalDecode: tokens chosen by two layers, for all that follow (arXiv 2410.05076).

The first layers attend to everything; a token selection layer does so too and keeps, per KV head,
the tokens of most probability; the layers behind it attend to those, until a layer in the middle
selects once more. Selection at every step. Difference: heads of a group share a set, by the sum of
their probabilities, as head sets of native GQA must.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomp import ops
from kvcomp.cache.view import Layer
from kvcomp.methods.baselines._shared_tokens import SharedTokens


@dataclass(frozen=True)
class TidalDecode(SharedTokens, name="tidal-decode", baseline=True):
    """Tokens by probability, a set per KV head.

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
