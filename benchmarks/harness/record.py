"""What a benchmark leaves behind: lines on the screen, and JSON that knows its machine."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import kvcomp
from kvcomp import _C
from kvcomp.info import cpu_model

NOT_INSTALLED = 3  # exit code of a script that needs a package which is not there
ENVIRONMENT = (
    "KVCOMP_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "THP_MEM_ALLOC_ENABLE",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass
class Row:
    """One line of the table, and one object in the JSON."""

    op: str
    shape: str
    dtype: str
    device: str
    impl: str
    ms: float = 0.0  # median
    ms_min: float = 0.0
    gbps: float | None = None  # by the formula of what must be moved, not by bytes touched
    ceiling_share: float | None = None  # of the probe in the same rounds
    ratios: dict[str, float] = field(default_factory=dict)  # baseline -> times faster, medians
    ratios_min: dict[str, float] = field(default_factory=dict)  # the same by minima
    ideal_ratios: dict[str, float] = field(default_factory=dict)  # what the bytes allow
    max_error: float | None = None  # against float64; None where there is nothing to compare
    spread: float | None = None  # of two runs of the same: a smaller difference is no result
    in_graph: bool = False  # on a GPU: replayed from a graph; without, the host's calls count too
    overhead: float | None = None  # share of the baseline's time that comes on top of it
    overhead_min: float | None = None  # the same by minima
    correct: bool = True  # no ratio is given for, or against, a wrong result

    def line(self) -> str:
        columns = [
            f"{self.op:16} {self.shape:42} {self.dtype:4} {self.impl:18} {_duration(self.ms)}",
            "     -  GB/s" if self.gbps is None else f"{self.gbps:7.1f} GB/s",
            "   - %" if self.ceiling_share is None else f"{self.ceiling_share:4.0%}",
        ]
        if not self.correct:
            columns.append("WRONG RESULT, no speed-up")
        columns += [self._ratio(name) for name in self.ratios]
        if self.spread is not None:
            columns.append(f"+-{self.spread:.1%}")
        if self.device == "cuda" and self.spread is not None and not self.in_graph:
            columns.append("no graph")
        if self.overhead is not None:
            columns.append(f"{self.overhead:+.1%} (min {self.overhead_min:+.1%}) over the baseline")
        if self.max_error is not None:
            columns.append(f"err {self.max_error:.1e}")
        return "  ".join(columns)

    def _ratio(self, name: str) -> str:
        text = f"{name} {_times(self.ratios[name])}"
        best = self.ratios_min.get(name, self.ratios[name])
        if not 0.85 < best / self.ratios[name] < 1.15:  # a busy machine: show the quiet moments too
            text += f" (min {_times(best)})"
        if name in self.ideal_ratios:
            text += f" of {_times(self.ideal_ratios[name])}"
        return text


def _duration(ms: float) -> str:
    return f"{ms:7.4g} ms" if ms >= 0.1 else f"{ms * 1e3:7.3g} us"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def meta(benchmark: str, device: str, **more) -> dict:
    """Machine, versions and commit: what a reader needs to judge or repeat the rows."""
    facts = {
        "benchmark": benchmark,
        "command": _command(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "kvcomp": kvcomp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "cpu": cpu_model(),
        "cpu_isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **more,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"], facts["sm_clock_mhz"] = _nvidia_smi("driver_version", "clocks.sm")
    return facts


def _nvidia_smi(*names: str) -> list[str | None]:
    """What the driver says of the current GPU; nothing where the program is absent."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    index = index or str(torch.cuda.current_device())
    command = ["nvidia-smi", "-i", index, f"--query-gpu={','.join(names)}"]
    try:
        run = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return [None] * len(names)
    return [field.strip() for field in run.stdout.strip().split(",")]


def header(facts: dict) -> str:
    """The same in a few lines, printed before the first row."""
    setting = [f"{name}={value}" for name, value in facts["environment"].items()]
    lines = [
        "  ".join(
            [f"{facts['cpu']}, {facts['threads']} threads, {facts['cpu_isa']}", *setting],
        ),
        f"kvcomp {facts['kvcomp']}  torch {facts['torch']}  python {facts['python']}"
        f"  commit {facts['commit'] or 'unknown'}",
    ]
    if "gpu" in facts:
        lines.insert(0, f"{facts['gpu']}, CUDA {facts['cuda']}, driver {facts['driver']}")
    if "ceiling" in facts:
        ceiling = facts["ceiling"]
        lines.append(f"ceiling {ceiling['gbps']:.1f} GB/s ({ceiling['probe']})")
    return "\n".join(lines)


def begin(facts: dict, smoke: bool) -> None:
    """Print the header, and for a smoke test that its numbers mean nothing."""
    print(header(facts), flush=True)
    if smoke:
        print("smoke test: the inputs are too small for these figures to mean anything")


def shown(rows: Iterable[Any]) -> Iterator[dict]:
    """Print each row as soon as it is measured, and yield it as plain data."""
    for row in rows:
        print(row.line(), flush=True)
        yield asdict(row)


def write_json(path: str | Path, facts: dict, rows: Sequence[Row | dict]) -> None:
    """{"meta", "rows"}, a row a line; NaN and infinity are errors and no numbers in a file."""
    plain = [asdict(row) if isinstance(row, Row) else row for row in rows]
    head = json.dumps(facts, indent=1, allow_nan=False)
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in plain)
    Path(path).write_text(f'{{"meta": {head},\n"rows": [\n{lines}\n]}}\n')


class OtherLoad:
    """The share of all CPU time that other processes took since this object was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """0..1, or None where the system does not say."""
        now = self._now()
        if now is None or self._start is None:
            return None
        total, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        hertz = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        own = sum(os.times()[:4])  # with that of children that have ended
        return sum(ticks) / hertz, (sum(ticks) - idle) / hertz, own


def _command(words: Sequence[str]) -> str:
    """The command without its file, which may stand anywhere."""
    kept = [Path(words[0]).name]
    for before, word in itertools.pairwise(words):
        if before != "--json" and word.partition("=")[0] != "--json":
            kept.append(word)
    return shlex.join(kept)


def _commit() -> str | None:
    """Of the checkout that the running script lies in; marked when it has changes."""
    folder = Path(sys.argv[0]).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def conclude(path: Path | None, facts: dict, rows: Sequence[Row | dict], load: OtherLoad) -> None:
    """Say how busy the machine was, and write the file that was asked for."""
    facts["others_cpu_share"] = load.share()
    if "gpu" in facts:
        (facts["sm_clock_mhz_after"],) = _nvidia_smi("clocks.sm")
    if facts["others_cpu_share"] is not None:
        print(f"\nother processes took {facts['others_cpu_share']:.0%} of the CPU meanwhile")
    if path is not None:
        write_json(path, facts, rows)
