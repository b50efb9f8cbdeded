"""page_scores: the attention that each page of a sequence receives."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream

REDUCTIONS = ("max", "sum")


def page_scores(
    logits: Tensor,
    lse: Tensor,
    seq_lens: Tensor,
    page_size: int,
    *,
    num_groups: int = 1,
    reduction: str = "max",
) -> Tensor:
    """The attention probabilities of a page's tokens, reduced over the heads of a group and summed.

    "max" takes the largest probability of each token over the heads, then sums over the tokens:
    DELTA's score (arXiv 2510.09883, section 3). "sum" gives the probability mass of the page. Use
    `num_groups` 1 for one page set for all heads, and Hkv for one set per KV head.

    Args:
        logits: [B, Hq, N] fp32, or fp16 except on the CPU, scaled logits from `decode_attention`;
            rows may be strided.
        lse: [B, Hq] fp32.
        seq_lens: [B] int32, valid tokens of each row, at most N.
        page_size: tokens in a page.
        num_groups: divides Hq.
        reduction: "max" or "sum" over the heads of a group.

    Returns:
        scores [B, num_groups, P] fp32 with P = ceil(N / page_size), 0 for pages past the end.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, an unknown reduction.
    """
    use_max = is_max("page_scores", reduction)
    return _op(logits, lse, seq_lens, page_size, num_groups, use_max)


def is_max(op: str, reduction: str) -> bool:
    """Whether `reduction` is "max". Raises ValueError if it is neither "max" nor "sum"."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"kvcomp.{op}: argument 'reduction': expected one of {REDUCTIONS}, got {reduction!r}"
        )
    return reduction == "max"


def reference(logits, lse, seq_lens, page_size, num_groups, use_max):
    batch, _, num_slots = logits.shape
    valid = torch.arange(num_slots, device=logits.device) < seq_lens[:, None, None]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # nothing attended: 0, not NaN
    probs = (logits - lse[..., None]).exp().where(valid, 0.0)
    probs = probs.view(batch, num_groups, -1, num_slots)
    tokens = probs.amax(2) if use_max else probs.sum(2)  # [B, num_groups, N]
    tokens = torch.nn.functional.pad(tokens, (0, -num_slots % page_size))
    return tokens.unflatten(-1, (-1, page_size)).sum(-1)


def fake(logits, lse, seq_lens, page_size, num_groups, use_max):
    shape = logits.size(0), num_groups, -(-logits.size(-1) // page_size)
    return logits.new_empty(shape, dtype=torch.float32)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(logits, lse, seq_lens, page_size, num_groups, use_max):
        # Sizes that make no sense reach the native checks, which say so.
        out = fake(logits, lse, seq_lens, max(page_size, 1), max(num_groups, 0), use_max)
        extension.page_scores(
            backend, logits, lse, seq_lens, out, page_size, num_groups, use_max, raw_stream(logits)
        )
        return out

    return run


_op = bind(
    "page_scores",
    "(Tensor logits, Tensor lse, Tensor seq_lens, int page_size, int num_groups, bool use_max)"
    " -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
