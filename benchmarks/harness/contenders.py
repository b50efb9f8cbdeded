"""One group of contenders: checked against the truth, then timed together with the probe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.record import Row
from harness.timing import Rotation, Timing, cold_sets, interleave, rounds_in_graph
from kvcomp.ops import OPS
from kvcomp.ops._widen import HALF, in_float32, in_float64
from kvcomp.probe import Probe
from kvcomp.selftest.compare import max_error

KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # worth timing on a device
REFERENCE_BYTES = 40 << 20  # larger inputs are not run through the reference


@dataclass
class Settings:
    device: str
    repeats: int
    budget: float  # seconds for one contender of a group
    cold: bool
    probe: Probe

    def num_sets(self, touched_bytes: int) -> int:
        return cold_sets(touched_bytes, self.device) if self.cold else 2


class Against(NamedTuple):
    """A ratio to report: to which contender, under which name, and what the bytes allow."""

    name: str
    key: str
    ideal: float | None = None


class Expected:
    """What a contender must return for the first set of inputs; it may return less.

    Integers are ids, whose order does not matter, unless they must be `exact`.
    """

    def __init__(
        self, reference: Callable, args: tuple, *, ids_may_differ: float = 0.0, exact: bool = False
    ) -> None:
        self.truth = _as_tuple(reference(*in_float64(args)))
        self.plain = _as_tuple(reference(*in_float32(args)))
        self.ids_may_differ = ids_may_differ
        self.exact = exact

    def error(self, result: object, *, ours: bool) -> float:
        """The error of the first output. AssertionError where an output is wrong."""
        results = _as_tuple(result)
        for got, truth, plain in zip(results, self.truth, self.plain, strict=False):
            if not got.is_floating_point():
                if self.exact:
                    assert torch.equal(got, truth), "integers differ"
                    continue
                missing = (~_isin_rows(truth, got)).double().mean().item()
                assert missing <= self.ids_may_differ, f"{missing:.1%} of the indices are missing"
                continue
            error = max_error(got, truth)
            budget = self._budget(got, truth, plain, ours)
            assert error <= budget, f"error {error:.1e} over the budget {budget:.1e}"
        floating = results[0].is_floating_point()
        return max_error(results[0], self.truth[0]) if floating else 0.0

    @staticmethod
    def _budget(got: Tensor, truth: Tensor, plain: Tensor, ours: bool) -> float:
        """The tests' budget for ours. A baseline only has to compute the same thing, in its own
        precision.
        """
        largest = truth.abs().max().item()
        if not ours:
            return (0.05 if got.dtype in HALF else 1e-3) * largest
        own = max_error(plain.to(got.dtype), truth)
        return 2 * (own + torch.finfo(got.dtype).eps * largest)


@dataclass
class Contender:
    impl: str
    call: Callable  # one set of inputs -> result
    num_bytes: int  # that must be moved
    variant: str = ""
    expected: Expected | None = None
    ours: bool = True
    against: tuple[Against, ...] = ()
    # Where the call changes its inputs: from those and what it returned to what is compared.
    results: Callable[[Any, object], tuple] | None = None

    @property
    def key(self) -> str:
        return f"{self.impl} {self.variant}".strip()

    def check(self, inputs: object) -> tuple[float | None, bool]:
        """The error against float64, and whether the result is right."""
        if self.expected is None:
            self.call(inputs)
            return None, True
        inputs = deepcopy(inputs) if self.results else inputs
        result = self.call(inputs)
        result = self.results(inputs, result) if self.results else result
        try:
            return self.expected.error(result, ours=self.ours), True
        except AssertionError as wrong:
            print(f"{self.key}: {wrong}", file=sys.stderr)
            return None, False


def measure(
    op: str, shape: str, dtype: str, sets: Sequence, contenders: list[Contender], run: Settings
) -> list[Row]:
    """Check each contender, then time all of them and the probe in turn."""
    checks = {c.key: c.check(sets[0]) for c in contenders}
    timings = timed(sets, {c.key: c.call for c in contenders}, run)
    ceiling = run.probe.bytes / timings["probe"].median
    rows = []
    for c in contenders:
        timing, (error, correct) = timings[c.key], checks[c.key]
        gbps = c.num_bytes / timing.median
        row = Row(op, f"{shape} {c.variant}".strip(), dtype, run.device, c.impl, max_error=error)
        row.ms, row.ms_min = timing.median * 1e3, timing.minimum * 1e3
        row.spread, row.in_graph = timing.spread, timing.in_graph
        row.gbps, row.ceiling_share, row.correct = gbps / 1e9, gbps / ceiling, correct
        for other in c.against:
            if not correct or not checks[other.key][1]:
                continue
            row.ratios[other.name] = timings[other.key].median / timing.median
            row.ratios_min[other.name] = timings[other.key].minimum / timing.minimum
            if other.ideal is not None:
                row.ideal_ratios[other.name] = other.ideal
        rows.append(row)
    timing = timings["probe"]
    probe = Row(op, shape, dtype, run.device, "probe", timing.median * 1e3, timing.minimum * 1e3)
    probe.gbps, probe.ceiling_share = ceiling / 1e9, 1.0
    return [*rows, probe]


def timed(sets: Sequence, calls: dict[str, Callable], run: Settings) -> dict[str, Timing]:
    """Each of the calls, given a set, and the "probe", in turn."""
    rotation = Rotation(sets)
    runs = {name: rotation.calling(call) for name, call in calls.items()}
    return interleave(
        runs | {"probe": run.probe.run},
        run.repeats,
        device=run.device,
        budget=run.budget,
        calls_in_graph=dict.fromkeys(runs, rounds_in_graph(len(sets))),
    )


def implementations(op: str, device: str, num_bytes: int = 0) -> list[str]:
    """What can run there: kernels first, and the reference where the input is small."""
    names = [name for name in KERNELS[device] if name in OPS[op].impls]
    return names + ["reference"] * (num_bytes <= REFERENCE_BYTES)


def _as_tuple(result: object) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _isin_rows(wanted: Tensor, got: Tensor) -> Tensor:
    """Which of the integers [..., n] are among those that were got [..., m] in the same row."""
    rows = zip(
        torch.atleast_2d(wanted).flatten(0, -2), torch.atleast_2d(got).flatten(0, -2), strict=True
    )
    return torch.stack([torch.isin(want, have) for want, have in rows])
