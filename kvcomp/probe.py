"""How fast this machine moves memory: the ceiling of every kernel that reads a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PROBE_BYTES = 256 << 20
ROUNDS = 8


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
    reads: dict[str, Callable[[], object]] = {
        "read, torch.sum": floats.sum,
        "read, torch.amax of int64": integers.amax,
        "read, torch.dot": lambda: torch.dot(floats, floats),
        "read, torch.mv": lambda: torch.mv(matrix, ones),
    }
    seconds = _fastest(reads, device)
    best = min(seconds, key=seconds.__getitem__)
    return Probe(best, reads[best], num_bytes, num_bytes / seconds[best] / 1e9)


def copy_probe(device: str = "cpu", num_bytes: int = PROBE_BYTES) -> Probe:
    """A plain copy, counted as read and written, to compare what writes as much as it reads."""
    floats = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(floats)

    def run() -> Tensor:
        return target.copy_(floats)

    seconds = _fastest({"copy": run}, device)["copy"]
    return Probe("copy, read + write", run, 2 * num_bytes, 2 * num_bytes / seconds / 1e9)


def link_probe(num_bytes: int = PROBE_BYTES) -> Probe:
    """A copy from pinned host memory to the GPU, counted once: what the link between them does."""
    floats = torch.randn(num_bytes // 4).pin_memory()
    target = torch.empty_like(floats, device="cuda")

    def run() -> Tensor:
        return target.copy_(floats, non_blocking=True)

    seconds = _fastest({"copy": run}, "cuda")["copy"]
    return Probe("copy from pinned memory", run, num_bytes, num_bytes / seconds / 1e9)


def _fastest(runs: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Seconds of the fastest call of each, over rounds in which all take their turn.

    The first round warms up. On a GPU, events stand on either side of the call, so that the time
    the host takes to launch it does not count.
    """
    clock = _gpu_seconds if device == "cuda" else _cpu_seconds
    rounds = [{name: clock(run) for name, run in runs.items()} for _ in range(1 + ROUNDS)]
    return {name: min(one[name] for one in rounds[1:]) for name in runs}


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
