"""The attention of a prompt's own queries, for methods whose scores start from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.alike import dots

QUERIES = 256  # at a time, so that no [n, n] matrix is formed


def prompt_probabilities(layer: LayerCache, q: Tensor) -> Iterator[Tensor]:
    """The attention probabilities of new tokens that are already in the cache, computed for some
    queries at a time.

    Args:
        q: [B, Hq, n, D], the queries of the newest n columns, padding included.

    Yields:
        [B, Hq, queries, max_len] fp32: causal, 0 for padding.
    """
    count = q.shape[2]
    valid = layer.seen()[:, -count:]  # [B, n]
    # The slot of each query's own token: the new ones lie at the end of a row, in order.
    own = layer.seq_lens[:, None] - valid.sum(1, keepdim=True) + valid.cumsum(1) - 1
    slot = torch.arange(layer.max_len, device=q.device)
    for first in range(0, count, QUERIES):
        part = slice(first, first + QUERIES)
        grouped = q[:, :, part].unflatten(1, (layer.kv_heads, -1))
        logits = dots(grouped, layer.keys[:, :, None]).flatten(1, 2) * layer.scale
        allowed = (slot <= own[:, part, None]) & valid[:, part, None]  # [B, queries, max_len]
        logits = logits.masked_fill(~allowed[:, None], -torch.inf)
        yield logits.softmax(-1).nan_to_num(0.0)  # a query that is padding attends to nothing
