"""attention_hits: mark the tokens that a decode step found important, one bit per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._arguments import expect
from kvcomp.ops._registry import bind, raw_stream


def attention_hits(
    logits: Tensor,
    lse: Tensor,
    seq_lens: Tensor,
    hits: Tensor,
    threshold: float,
    *,
    row: int | Tensor | None = None,
) -> None:
    """Mark the tokens whose probability reaches `threshold` under any head of a unit.

    The test is `logit >= lse + log(threshold)`, so no probability is computed. A unit is a group of
    Hq / U heads that keep one set of tokens; U is 1 (all heads), Hkv or Hq.

    Args:
        logits: [B, Hq, N] fp32, or fp16 except on the CPU, scaled logits from `decode_attention`;
            rows may be strided.
        lse: [B, Hq] fp32. With -inf (nothing attended) no token is marked.
        seq_lens: [B] int32, valid tokens of each row, at most N.
        hits: [B, U, W] int32, output, W * 32 >= N. Bit i % 32 of word i // 32 stands for token i;
            bits past the end of a row are 0. B may be strided.
        threshold: probability in (0, 1); LazyEviction's alpha (arXiv 2506.15969).
        row: with it, hits is [B, R, U, W], the bits of R steps, and only hits[:, row] is written.
            Either a number, or [1] int64 on the device for a graph that writes another row at each
            replay.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; a threshold outside (0, 1).
    """
    if not isinstance(threshold, float):
        expect("attention_hits", "threshold", "float", threshold)
    if not 0 < threshold < 1:
        raise ValueError(
            "kvcomp.attention_hits: argument 'threshold': expected a probability between 0 and 1,"
            f" got {threshold}"
        )
    into = hits if row is None else _row(hits, row)
    _op(logits, lse, seq_lens, into, math.log(threshold))
    if isinstance(row, Tensor):
        hits.index_copy_(1, row, into[:, None])


def _row(hits: Tensor, row: int | Tensor) -> Tensor:
    """The output for one step: hits[:, row], or new memory if only the device knows the row."""
    expect("attention_hits", "hits", "Tensor", hits)
    if isinstance(row, Tensor):
        if row.shape != (1,) or row.dtype != torch.int64:
            raise ValueError(
                "kvcomp.attention_hits: argument 'row': expected a number or a tensor [1] of int64,"
                f" got {list(row.shape)} of {row.dtype}"
            )
        return hits.new_empty(hits.shape[:1] + hits.shape[2:])
    expect("attention_hits", "row", "int", row)
    if hits.ndim != 4 or not 0 <= row < hits.shape[1]:
        raise ValueError(
            "kvcomp.attention_hits: argument 'row': expected a row of hits [B, R, U, W], got"
            f" {row} of {list(hits.shape)}"
        )
    return hits[:, row]


def reference(logits, lse, seq_lens, hits, log_threshold):
    num_slots = logits.shape[-1]
    num_units, words = hits.shape[1:]
    valid = torch.arange(num_slots, device=logits.device) < seq_lens[:, None, None]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # nothing attended
    hit = (logits - lse[..., None] >= log_threshold) & valid
    hit = hit.unflatten(1, (num_units, -1)).any(2)
    hit = torch.nn.functional.pad(hit, (0, words * 32 - num_slots)).unflatten(-1, (words, 32))
    bits = (hit.long() << torch.arange(32, device=hit.device)).sum(-1)
    hits.copy_(bits - ((bits >> 31) << 32))  # as a signed number


def fake(logits, lse, seq_lens, hits, log_threshold):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(logits, lse, seq_lens, hits, log_threshold):
        extension.attention_hits(
            backend, logits, lse, seq_lens, hits, log_threshold, raw_stream(logits)
        )

    return run


_op = bind(
    "attention_hits",
    "(Tensor logits, Tensor lse, Tensor seq_lens, Tensor(a!) hits, float log_threshold) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
