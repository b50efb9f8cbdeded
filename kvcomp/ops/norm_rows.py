"""norm_rows: the RMS norm of rows in one pass."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for each row, in fp32, rounded once.

    Models make it from six small ops, whose calls take much longer than their work for the single
    row of a decode step. The result of a row has the same bits for any other rows and any number of
    threads.

    Args:
        x: [..., D], fp32, fp16 or bf16, contiguous.
        weight: [D] of the same dtype, contiguous.
        eps: finite and not negative.

    Returns:
        [..., D] of the inputs' dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, layout or value.
    """
    return _op(x, weight, eps)


def reference(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def fake(x, weight, eps):
    return torch.empty_like(x)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(x, weight, eps):
        out = fake(x, weight, eps)
        extension.norm_rows(backend, x, weight, out, eps, 0)
        return out

    return run


_op = bind(
    "norm_rows",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
)
