"""The error budget: an op may err twice as much as its own reference in fp32, plus rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvcomp.ops import OPS
from kvcomp.ops._widen import in_float64
from kvcomp.selftest.case import Case


class WrongResult(AssertionError):
    """An output outside its budget. `error` is the largest, infinite where it is not a number."""

    def __init__(self, message: str, error: float = math.inf) -> None:
        super().__init__(message)
        self.error = error


def check(case: Case, impl: str, dtype: torch.dtype, device: str) -> None:
    """Compare one implementation on one case with the reference in float64.

    Raises:
        WrongResult: some output, or some argument that the op writes, is wrong.
    """
    op = OPS[case.op]
    args = case.make(dtype, device)
    truth = outputs(op.reference, case, in_float64(case.make(dtype, device)))
    fallback = outputs(op.impls["reference"], case, case.make(dtype, device))
    actual = outputs(op.impls[impl], case, args)
    if len(actual) != len(truth):
        raise WrongResult(f"{case} {impl}: {len(actual)} outputs, not {len(truth)}")
    for index, (got, want, plain) in enumerate(zip(actual, truth, fallback, strict=True)):
        what = f"{case} {impl} output {index}"
        if got.is_floating_point():
            slack = case.slack(impl, args) if case.slack and index == 0 else 0.0
            assert_close(got, want, plain, what, slack)
        elif not torch.equal(got, want):
            raise WrongResult(f"{what}: {got} is not {want}")


def outputs(impl: Callable, case: Case, args: Sequence) -> tuple[Tensor, ...]:
    """Call an implementation; its results and then the arguments that it wrote."""
    result = impl(*args)
    result = result if isinstance(result, tuple) else () if result is None else (result,)
    if case.blank:
        case.blank(args)
    for position in case.mutates:
        written = args[position]
        result += (written,) if isinstance(written, Tensor) else tuple(written)
    return result


def assert_close(
    actual: Tensor, truth: Tensor, fallback: Tensor, what: str, slack: float = 0.0
) -> None:
    """`|actual - truth| <= 2 |fallback - truth| + n eps max|truth| + slack` and equal infinities.

    n is 2, and 4 in fp32: there the outputs are sums, which every order rounds in another way, and
    with the library of some CPUs those of the fallback happen to be nearly exact.

    Args:
        actual: the implementation's output.
        truth: the reference in float64.
        fallback: the reference in fp32, rounded to the output's dtype.

    Raises:
        WrongResult: it is not so. Raised rather than asserted, so that `python -O` changes nothing.
    """
    if actual.dtype != fallback.dtype:
        raise WrongResult(f"{what}: dtype {actual.dtype}, not {fallback.dtype}")
    if actual.shape != truth.shape:
        raise WrongResult(f"{what}: shape {actual.shape}, not {truth.shape}")
    finite = truth.isfinite()
    got = actual.double()
    if not torch.equal(got[~finite], truth[~finite]):
        raise WrongResult(f"{what}: infinities differ")
    if not got[finite].isfinite().all():
        raise WrongResult(f"{what}: NaN or infinity where a number belongs")
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    own = (fallback.double() - truth)[finite].abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * truth[finite].abs().max().item()
    budget = 2 * own + (4 if actual.dtype == torch.float32 else 2) * rounding + slack
    if error > budget:
        raise WrongResult(f"{what}: error {error:.3e} over the budget {budget:.3e}", error)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute error over the finite part of the truth."""
    finite = truth.isfinite()
    return (actual.double() - truth)[finite].abs().max().item() if finite.any() else 0.0


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Freshly allocated memory reads as NaN (or a wild integer), so that a gap cannot hide."""
    settings: Any = torch.utils.deterministic  # a module that checks what is set on it
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]
