"""merge_states: combine two partial attentions over disjoint token sets."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint token sets, computed from their (out, lse).

    The operation is exact and associative. (0, -inf) is its neutral element, so a row that attended
    to nothing changes nothing.

    Args:
        out_a, out_b: [B, Hq, D], all of the same dtype: fp32, fp16 or bf16.
        lse_a, lse_b: [B, Hq] fp32, natural log.

    Returns:
        out [B, Hq, D] of the inputs' dtype and lse [B, Hq] fp32.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout.
    """
    return _op(out_a, lse_a, out_b, lse_b)


def reference(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)  # both empty: weights of 0
    weight_a, weight_b = (lse_a - base).exp(), (lse_b - base).exp()
    return out_a * weight_a[..., None] + out_b * weight_b[..., None], lse


def fake(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(out_a, lse_a, out_b, lse_b):
        out, lse = fake(out_a, lse_a, out_b, lse_b)
        extension.merge_states(backend, out_a, lse_a, out_b, lse_b, out, lse, raw_stream(out_a))
        return out, lse

    return run


_op = bind(
    "merge_states",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    triton=True,
)
