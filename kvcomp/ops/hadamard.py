"""hadamard: rows times the Walsh-Hadamard matrix, which spreads what few channels hold."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def hadamard(x: Tensor) -> Tensor:
    """Rows x [..., D] times the Walsh-Hadamard matrix over sqrt(D). It is orthogonal and its own
    inverse: queries and keys that are turned alike have the same inner products.

    Args:
        x: [..., D] contiguous; fp32, fp16 or bf16; D a power of two from 16 to 512.

    Returns:
        [..., D] of x's dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout.

    Source:
        rotation of K and q before they are quantised: QuaRot (2404.00456), section 3.
    """
    return _op(x)


def reference(x):
    size, half = x.shape[-1], 1
    while half < size:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return x * torch.tensor(size, dtype=torch.float32).rsqrt().to(x)


def fake(x):
    return torch.empty_like(x)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(x):
        out = fake(x)
        extension.hadamard(backend, x, out, raw_stream(x))
        return out

    return run


_op = bind(
    "hadamard",
    "(Tensor x) -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
