"""linear_rows: a linear layer for the few input rows of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor
from torch.nn import functional

from kvcomp.ops._registry import bind

MAX_ROWS = 32


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for at most 32 rows of x, summed in fp32.

    With so few rows the time of a linear layer is the time to read its weights. They are read once
    for all rows, in their own layout, neither packed nor copied. The result of a row has the same
    bits for any other rows and any number of threads.

    Args:
        x: [..., in], fp32, fp16 or bf16, `in` contiguous; at most 32 rows.
        weight: [out, in] of the same dtype, any stride between its rows.
        bias: [out], contiguous, or None.

    Returns:
        [..., out] of the inputs' dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, or more than 32 rows.
    """
    return _op(x, weight, bias)


def reference(x, weight, bias):
    return functional.linear(x, weight, bias)


def fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def native(extension: ModuleType, backend: int) -> Callable:
    def run(x, weight, bias):
        out = fake(x, weight, bias)
        extension.linear_rows(backend, x, weight, bias, out, 0)
        return out

    return run


_op = bind(
    "linear_rows",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
)
