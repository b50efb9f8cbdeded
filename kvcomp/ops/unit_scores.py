"""unit_scores: score each unit of tokens by its centroid for the queries of a step."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._arguments import default_scale
from kvcomp.ops._registry import bind, raw_stream


def unit_scores(
    q: Tensor,
    centroids: Tensor,
    starts: Tensor,
    num_indexed: Tensor,
    active: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """The softmax of scale * <q, centroid> over a head's units, averaged over the group's queries.

    Units that are empty (starts[u] == starts[u + 1]) or not indexed (u >= num_indexed) are left out
    of the softmax and score 0. So does every unit of an inactive row.

    Args:
        q: [B, Hq, D]; fp32, fp16 or bf16; strided over B and Hq, D contiguous, a multiple of 16 and
            at most 2048.
        centroids: [B, Hkv, U, D] of q's dtype, contiguous in the last two.
        starts: [B, Hkv, U + 1] int32, contiguous in the last dimension.
        num_indexed: [B] int32, at most U.
        active: [B] int32, 0 for rows to leave out.
        scale: 1 / sqrt(D) by default.

    Returns:
        scores [B, Hkv, U] fp32; the scores of an active row and head sum to 1.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also invalid
            counts.

    Source: LouisKV (arXiv 2510.11292), its selection shared by a group of query heads.
    """
    if scale is None:
        scale = default_scale(q)
    return _op(q, centroids, starts, num_indexed, active, scale)


def reference(q, centroids, starts, num_indexed, active, scale):
    batch, heads, units, _ = centroids.shape
    exists = torch.arange(units, device=q.device) < num_indexed[:, None, None]
    exists = exists & (starts[..., 1:] > starts[..., :-1]) & (active != 0)[:, None, None]
    grouped = q.reshape(batch, heads, -1, q.shape[-1])
    # What lies beyond the indexed units may never have been written.
    logits = grouped @ centroids.masked_fill(~exists[..., None], 0.0).transpose(-1, -2) * scale
    probs = logits.masked_fill(~exists[:, :, None], -torch.inf).softmax(-1)
    return probs.masked_fill(~exists[:, :, None], 0.0).mean(2)


def fake(q, centroids, starts, num_indexed, active, scale):
    return q.new_empty(centroids.shape[:3], dtype=torch.float32)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(q, centroids, starts, num_indexed, active, scale):
        scores = fake(q, centroids, starts, num_indexed, active, scale)
        extension.unit_scores(
            backend, q, centroids, starts, num_indexed, active, scores, scale, raw_stream(q)
        )
        return scores

    return run


_op = bind(
    "unit_scores",
    "(Tensor q, Tensor centroids, Tensor starts, Tensor num_indexed, Tensor active, float scale)"
    " -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    triton=True,
)
