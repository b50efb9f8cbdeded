"""query_similarity: the cosine between the queries of a step and of the step before."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def query_similarity(q: Tensor, previous: Tensor) -> Tensor:
    """The mean over heads of cos(previous, q). Afterwards `previous` holds `q`.

    A head whose query is 0 in either step counts as 0. If all previous queries of a row are 0, it
    has not had a step yet, and its similarity is -inf, below any threshold.

    Args:
        q: [B, Hq, D]; fp32, fp16 or bf16; strided over B and Hq, D contiguous, a multiple of 16 and
            at most 1024.
        previous: [B, Hq, D] of q's dtype, contiguous, changed in place.

    Returns:
        similarity [B] fp32.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout.

    Source: LouisKV (arXiv 2510.11292), its retrieval trigger.
    """
    return _op(q, previous)


def reference(q, previous):
    dot = (q * previous).sum(-1)
    norms = q.norm(dim=-1) * previous.norm(dim=-1)
    cosine = torch.where(norms > 0, dot / norms.where(norms > 0, 1.0), 0.0).clamp(-1, 1)
    unknown = (previous == 0).flatten(1).all(1)
    previous.copy_(q)
    return cosine.mean(1).masked_fill(unknown, -torch.inf)


def fake(q, previous):
    return q.new_empty(q.size(0), dtype=torch.float32)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(q, previous):
        similarity = fake(q, previous)
        extension.query_similarity(backend, q, previous, similarity, raw_stream(q))
        return similarity

    return run


_op = bind(
    "query_similarity",
    "(Tensor q, Tensor(a!) previous) -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    triton=True,
)
