"""Are the kernels right on this machine? The op tests' cases on all implementations that run here.

`kvcomp info --selftest` prints the result. It needs what the ops need, and no test framework.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import torch

from kvcomp.ops import OPS
from kvcomp.selftest.cases import CASES
from kvcomp.selftest.compare import WrongResult, check, poisoned_outputs

if TYPE_CHECKING:
    from rich.table import Table

DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # implementation -> where it is at home


def run() -> dict[str, dict[str, dict[str, Any]]]:
    """Op -> implementation -> {"state": "ok" | "wrong" | "absent", ...}, ready for JSON.

    A state comes with the number of `runs`. "wrong" also has how many of them are, and of the
    worst its `case`, its `message` and its `error` (None where it is no number); "absent" has the
    `reason`.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with warnings.catch_warnings(), poisoned_outputs():
        warnings.simplefilter("ignore")  # some of torch's own ops are not deterministic
        for name in OPS:
            found[name] = {impl: _tried(name, impl) for impl in DEVICES}
    return found


def _tried(name: str, impl: str) -> dict[str, Any]:
    op = OPS[name]
    if impl not in op.impls:
        return {"state": "absent", "reason": op.missing[impl]}
    if DEVICES[impl] == "cuda" and not torch.cuda.is_available():
        return {"state": "absent", "reason": "torch sees no GPU"}
    cases = [case for case in CASES if case.op == name and impl not in case.refused_by]
    runs = [(case, dtype) for case in cases for dtype in case.dtypes]
    wrong = []
    for case, dtype in runs:
        try:
            check(case, impl, dtype, DEVICES[impl])
        except Exception as problem:  # also what a kernel cannot take, or a compiler
            error = problem.error if isinstance(problem, WrongResult) else math.inf
            what = f"{case.name} {str(dtype).removeprefix('torch.')}"
            wrong.append((error, what, " ".join(str(problem).split()) or repr(problem)))
    if not wrong:
        return {"state": "ok", "runs": len(runs)}
    error, what, message = max(wrong)
    return {
        "state": "wrong",
        "runs": len(runs),
        "wrong": len(wrong),
        "error": error if math.isfinite(error) else None,
        "case": what,
        "message": message,
    }


def is_right(found: dict[str, dict[str, dict[str, Any]]]) -> bool:
    """Whether nothing that runs here is wrong."""
    return all(one["state"] != "wrong" for impls in found.values() for one in impls.values())


def table(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """The same for people: a row per op, a column per implementation."""
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("self-test", *DEVICES):
        rows.add_column(heading, overflow="fold")
    for name, impls in found.items():
        rows.add_row(name, *(_cell(impls[impl]) for impl in DEVICES))
    return rows


def _cell(one: dict[str, Any]) -> str:
    if one["state"] == "absent":
        return f"absent: {one['reason']}"
    if one["state"] == "ok":
        return f"ok ({one['runs']})"
    return f"WRONG in {one['wrong']} of {one['runs']}"


def complaints(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A line for each implementation that is wrong: its worst case, and how wrong that is."""
    return [
        f"{name} {impl}, worst in {one['case']}: {textwrap.shorten(one['message'], 240)}"
        for name, impls in found.items()
        for impl, one in impls.items()
        if one["state"] == "wrong"
    ]
