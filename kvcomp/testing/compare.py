"""The error budget: an op may err twice as much as its own reference in fp32, plus rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcomp.testing.case import Case


def in_float64(args: tuple) -> tuple:
    """The same arguments with every floating tensor widened: the reference on them is the truth."""
    return tuple(_widened(a) for a in args)


def _widened(argument: object) -> object:
    if isinstance(argument, list):
        return [_widened(each) for each in argument]
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument


def outputs(impl: Callable, case: Case, args: tuple) -> tuple[Tensor, ...]:
    """Call an implementation; its results and then the arguments that it wrote."""
    result = impl(*args)
    result = result if isinstance(result, tuple) else () if result is None else (result,)
    if case.blank:
        case.blank(args)
    for position in case.mutates:
        written = args[position]
        result += (written,) if isinstance(written, Tensor) else tuple(written)
    return result


def assert_close(actual: Tensor, truth: Tensor, fallback: Tensor, what: str) -> None:
    """`|actual - truth| <= 2 (|fallback - truth| + eps max|truth|)` and equal infinities.

    Args:
        actual: the implementation's output.
        truth: the reference in float64.
        fallback: the reference in fp32, rounded to the output's dtype.
    """
    assert actual.dtype == fallback.dtype, f"{what}: dtype {actual.dtype}, not {fallback.dtype}"
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, not {truth.shape}"
    finite = truth.isfinite()
    got = actual.double()
    assert torch.equal(got[~finite], truth[~finite]), f"{what}: infinities differ"
    assert got[finite].isfinite().all(), f"{what}: NaN or infinity where a number belongs"
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    own = (fallback.double() - truth)[finite].abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * truth[finite].abs().max().item()
    budget = 2 * (own + rounding)
    assert error <= budget, f"{what}: error {error:.3e} over the budget {budget:.3e}"


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute error over the finite part of the truth."""
    finite = truth.isfinite()
    return (actual.double() - truth)[finite].abs().max().item() if finite.any() else 0.0
