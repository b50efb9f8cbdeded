"""Arithmetic for scores in which equal inputs give equal results at any place in a tensor.

A vectorised sigmoid, a column sum or a matrix product may compute the last few elements of a tensor
in another way than the rest and differ there in the last bit. Scores that should tie then differ,
and another machine or memory layout evicts another token. The functions here use elementwise
additions, multiplications and divisions, which IEEE 754 rounds in one defined way, and exact sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -104.0  # whose exp is 0 in fp32
HALVINGS, TERMS = 10, 9  # of an exponent, and of the Taylor series: 1e-12 of the value
BITS = 22  # of the integers that are multiplied: 512 products then add up to 2^53 at most


def exp(x: Tensor) -> Tensor:
    """exp(x) in fp64 for x <= 0, at least the smallest value that fp32 can hold."""
    x = x.double().clamp(min=LOWEST) / 2**HALVINGS
    power = torch.ones_like(x)
    for term in range(TERMS, 0, -1):
        power = power * x / term + 1
    for _ in range(HALVINGS):
        power = power * power
    return power


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in fp64, for x <= 0."""
    power = exp(x)
    return power / (1 + power)


def softmax(x: Tensor) -> Tensor:
    """The softmax over the last dimension in fp32; NaN if all its elements are -inf."""
    power = exp(x.double() - x.amax(-1, keepdim=True))
    return (power / power.sum(-1, keepdim=True)).float()


def total(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, added in the same order for every element of the result."""
    while (count := x.shape[dim]) > 1:
        half = count // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if count % 2:
            folded = torch.cat([folded, x.narrow(dim, count - 1, 1)], dim)
        x = folded
    return x.squeeze(dim)


def exact_total(x: Tensor, dim: int) -> Tensor:
    """The sum of numbers from -1 to 1 in fp32. They are first rounded to multiples of 2^-36, so the
    order of the additions does not matter."""
    return ((x.double() * 2**36).round().sum(dim) / 2**36).float()


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows: a [..., n, D], b [..., m, D] -> [..., n, m] fp32, D at most 1024.

    Each row is scaled by its largest element and rounded to integers of 22 bits. In fp64 the
    products and their sums are then exact, whatever order a library adds them in.
    """
    (a, a_step), (b, b_step) = _integers(a), _integers(b)
    return (a @ b.transpose(-1, -2) * a_step * b_step.transpose(-1, -2)).float()


def _integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in fp64 and the step of each row, so that x is close to integers * step."""
    x = x.double()
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 2**BITS
    return (x / step).round(), step
