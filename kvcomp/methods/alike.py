"""Arithmetic for scores: equal inputs give equal results, wherever in a tensor they lie.

A vectorised sigmoid, a column sum or a matrix product may treat the last few elements of a tensor
otherwise than the rest, and differ in the last bit there. Scores that should tie then do not, and
another token leaves on another machine or in another memory layout. What is here is made of
additions, multiplications and divisions by element, each of which IEEE 754 rounds in one way, and
of sums that are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -104.0  # whose exp is 0 in fp32
HALVINGS, TERMS = 10, 9  # of an exponent, and of the Taylor series: 1e-12 of the value
BITS = 22  # of the integers that are multiplied: 512 products then add up to 2^53 at most


def exp(x: Tensor) -> Tensor:
    """fp64, for x <= 0; what fp32 cannot hold counts as the least that it can."""
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
    """Over the last dimension, fp32; NaN where all is -inf."""
    power = exp(x.double() - x.amax(-1, keepdim=True))
    return (power / power.sum(-1, keepdim=True)).float()


def total(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, in the same order for every element of the result."""
    while (count := x.shape[dim]) > 1:
        half = count // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if count % 2:
            folded = torch.cat([folded, x.narrow(dim, count - 1, 1)], dim)
        x = folded
    return x.squeeze(dim)


def exact_total(x: Tensor, dim: int) -> Tensor:
    """The sum of numbers from -1 to 1, rounded to multiples of 2^-36 first: the same in any order.
    fp32."""
    return ((x.double() * 2**36).round().sum(dim) / 2**36).float()


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows: a [..., n, D], b [..., m, D] -> [..., n, m] fp32, D at most 512.

    Rows become integers of the size of their largest element, to 22 bits: in fp64 the products and
    their sums are exact, in whatever order a library takes them.
    """
    (a, a_step), (b, b_step) = _integers(a), _integers(b)
    return (a @ b.transpose(-1, -2) * a_step * b_step.transpose(-1, -2)).float()


def _integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 integers and what one of them is worth, by row: x = integers * step, nearly."""
    x = x.double()
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 2**BITS
    return (x / step).round(), step
