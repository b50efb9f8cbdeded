"""The share of attention that a retrieved set covers, relative to the best set of its size."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache


def recall(layer: LayerCache, q: Tensor, scale: float, budget: int, sinks: int) -> Tensor:
    """The probability of a row's resident tokens divided by that of its best `budget` tokens.

    Sinks and local tokens are left out of both, because they are always resident. This reads all
    keys from the pool and is meant for studies.

    Returns:
        [B] fp32, the mean over KV heads; 1 if there is nothing to retrieve.
    """
    positions = layer.positions(layer.kv_heads)
    shares = []
    for row, end in enumerate(layer.hosted.index.first_local().tolist()):
        keys, _ = layer.decoded(layer.hosted.pool.read(row, sinks, end))  # [Hkv, n, D]
        if not keys.shape[1]:
            shares.append(q.new_ones((), dtype=torch.float32))
            continue
        grouped = q[row].float().unflatten(0, (keys.shape[0], -1))  # [Hkv, G, D]
        probs = (grouped @ keys.float().transpose(1, 2) * scale).softmax(-1).mean(1)  # [Hkv, n]
        best = probs.topk(min(budget, probs.shape[-1])).values.sum(-1)
        held = positions[row, :, : int(layer.seq_lens[row])].long() - sinks
        inside = (held >= 0) & (held < probs.shape[-1])
        covered = probs.gather(-1, held.where(inside, 0)).where(inside, 0.0).sum(-1)
        shares.append((covered / best).mean())
    return torch.stack(shares)


def watch(
    layer: LayerCache, q: Tensor, scale: float, budget: int, sinks: int, triggered: Tensor
) -> None:
    """Meter the recall of this step and of the step before, in rows where triggered [B] is 1."""
    now, before = recall(layer, q, scale, budget, sinks), layer.state.get("recall")
    if before is not None:
        layer.cache.meter.audited(before[triggered > 0], now[triggered > 0])
    layer.state["recall"] = now
