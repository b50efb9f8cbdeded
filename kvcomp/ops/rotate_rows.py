"""rotate_rows: the rotary embedding of the queries and keys of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind


def rotate_rows(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin for queries and keys, where rotate_half maps the halves (a, b)
    of a head to (-b, a).

    Models make it from some sixteen small ops, whose calls take much longer than their work for the
    single token of a decode step. On the CPU each product and the sum are rounded to the dtype, as
    those ops round them: the result is theirs to the last bit.

    Args:
        q, k: [B, Hq, n, D] and [B, Hkv, n, D], fp32, fp16 or bf16, any strides but that of D, which
            is a multiple of 16 and at most 1024.
        cos, sin: [B or 1, n, D] of the same dtype.

    Returns:
        q and k, rotated, in new memory.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout.

    Source:
        RoPE (2104.09864), section 3.4.2, with pairs of elements D / 2 apart.
    """
    return _op(q, k, cos, sin)


def reference(q, k, cos, sin):
    return tuple(x * cos[:, None] + _half_turned(x) * sin[:, None] for x in (q, k))


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def fake(q, k, cos, sin):
    return torch.empty_like(q), torch.empty_like(k)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(q, k, cos, sin):
        outs = fake(q, k, cos, sin)
        extension.rotate_rows(backend, q, k, cos, sin, *outs, 0)
        return outs

    return run


_op = bind(
    "rotate_rows",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
)
