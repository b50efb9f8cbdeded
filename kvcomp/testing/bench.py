"""What the benchmarks share: timing, cold buffers, the bandwidth probe, the line and the JSON.

Ratios of one run are the only claims: everything that is compared runs in one process in turn
(A B C, B A C ...), the read probe too, on buffers that have left the caches since their last use.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import kvcomp
from kvcomp import _C
from kvcomp.info import cpu_model

SHORTEST_SAMPLE = 2e-4  # seconds; quicker calls are timed several at a time
CALLS_IN_GRAPH = 20
LEAST_SAMPLES = 3
PROBE_BYTES = 256 << 20
ENVIRONMENT = ("KVCOMP_ISA", "OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "CUDA_VISIBLE_DEVICES")


# --- timing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    minimum: float
    samples: int


def interleave(
    runs: dict[str, Callable[[], object]],
    repeats: int = 30,
    *,
    device: str = "cpu",
    budget: float = math.inf,
    calls_in_graph: int = CALLS_IN_GRAPH,
) -> dict[str, Timing]:
    """Time the callables in turn.

    Args:
        runs: name -> what to time. Each call should take the next set of a `Rotation`.
        repeats: rounds, each in another order and each sample after an untimed call, so that
            nobody pays for what a certain neighbour leaves behind (dirty cache lines above all).
        device: on "cuda" a sample is the replay of a graph of many calls.
        budget: seconds for one callable. One that needs more sits rounds out, evenly spread, but
            is timed LEAST_SAMPLES times whatever it takes.
        calls_in_graph: calls that one graph holds; at least as many as there are cold buffers.
    """
    if device == "cuda":
        timers = {name: _graph_timer(run, calls_in_graph) for name, run in runs.items()}
    else:
        timers = {name: _call_timer(run) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    order = random.Random(0)
    for turn in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            if len(samples[name]) >= LEAST_SAMPLES and spent[name] > budget * turn / repeats:
                continue
            start = time.perf_counter()
            samples[name].append(timers[name]())
            spent[name] += time.perf_counter() - start
    return {name: Timing(statistics.median(s), min(s), len(s)) for name, s in samples.items()}


def _call_timer(run: Callable) -> Callable[[], float]:
    def sample(calls: int) -> float:
        run()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    calls = max(1, math.ceil(SHORTEST_SAMPLE / sample(1)))
    return lambda: sample(calls)


def _graph_timer(run: Callable, calls: int) -> Callable[[], float]:
    """A CUDA graph of `calls` calls; what cannot be captured would stall a decode, and fails."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return sample


class Rotation:
    """Hands out sets of inputs in turn, whoever asks, so that a set has gone cold when it is back.

    Neighbouring sets must not share large buffers: what one callable has just read, the next one
    would find in the cache.
    """

    def __init__(self, sets: Sequence) -> None:
        self.sets = sets
        self._turn = itertools.cycle(sets)

    def calling(self, function: Callable) -> Callable[[], object]:
        return lambda: function(next(self._turn))


def cold_sets(touched_bytes: int, device: str = "cpu") -> int:
    """How many sets it takes to touch four times the last-level cache; two at least."""
    return max(2, -(-4 * last_level_cache(device) // touched_bytes))


def last_level_cache(device: str = "cpu") -> int:
    """Bytes; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().strip().rstrip("K")) << 10 for s in sizes), default=32 << 20)


# --- the ceiling ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The fastest way that torch has to move a large buffer here; `run` moves `bytes` once."""

    name: str
    run: Callable[[], object]
    bytes: int
    gbps: float  # best seen when it was chosen


def bandwidth_probe(device: str = "cpu", num_bytes: int = PROBE_BYTES) -> Probe:
    """The best of several reads on the CPU; on a GPU a copy, counted as read and written.

    The reads compute next to nothing, but none prefetches, so that a kernel which does can pass
    100 %.
    """
    if device == "cuda":
        return copy_probe(device, num_bytes)
    floats = torch.randn(num_bytes // 4)
    integers = floats.view(torch.int64)
    matrix, ones = floats.view(-1, 4096), torch.ones(4096)
    candidates = {
        "read, torch.sum": (floats.sum, num_bytes),
        "read, torch.amax of int64": (integers.amax, num_bytes),
        "read, torch.dot": (lambda: torch.dot(floats, floats), num_bytes),
        "read, torch.mv": (lambda: torch.mv(matrix, ones), num_bytes),
    }
    timings = interleave({name: run for name, (run, _) in candidates.items()}, 8, device=device)
    rates = {name: candidates[name][1] / timing.minimum for name, timing in timings.items()}
    best = max(rates, key=rates.__getitem__)
    return Probe(best, *candidates[best], rates[best] / 1e9)


def copy_probe(device: str = "cpu", num_bytes: int = PROBE_BYTES) -> Probe:
    """A plain copy, counted as read and written, to compare what writes as much as it reads."""
    floats = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(floats)

    def run() -> Tensor:
        return target.copy_(floats)

    timing = interleave({"copy": run}, 8, device=device)["copy"]
    gbps = 2 * num_bytes / timing.minimum / 1e9
    return Probe("copy, read + write", run, 2 * num_bytes, gbps)


# --- rows -----------------------------------------------------------------------------------------


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
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).partition(" --json")[0],
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
    return facts


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
        lines.insert(0, f"{facts['gpu']}, CUDA {facts['cuda']}")
    if "ceiling" in facts:
        ceiling = facts["ceiling"]
        lines.append(f"ceiling {ceiling['gbps']:.1f} GB/s ({ceiling['probe']})")
    return "\n".join(lines)


def write_json(path: str | Path, facts: dict, rows: Sequence[Row | dict]) -> None:
    """{"meta", "rows"}; a NaN or an infinity is an error and not a number in a file."""
    plain = [asdict(row) if isinstance(row, Row) else row for row in rows]
    text = json.dumps({"meta": facts, "rows": plain}, indent=1, allow_nan=False)
    Path(path).write_text(text + "\n")


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
        return sum(ticks) / hertz, (sum(ticks) - idle) / hertz, time.process_time()


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
    if facts["others_cpu_share"] is not None:
        print(f"\nother processes took {facts['others_cpu_share']:.0%} of the CPU meanwhile")
    if path is not None:
        write_json(path, facts, rows)
