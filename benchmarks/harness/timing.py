"""How the benchmarks time: contenders in turn, on buffers that have left the caches.

Ratios of one run are the only claims: everything that is compared runs in one process in turn
(A B C, B A C ...), the bandwidth probe too, on buffers that nobody has used for a while.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SHORTEST_SAMPLE = 2e-4  # seconds; quicker calls are timed several at a time
CALLS_IN_GRAPH = 20
LEAST_SAMPLES = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    minimum: float
    samples: int
    spread: float = 0.0  # of the medians of the first and the second half, as a share
    in_graph: bool = False


def interleave(
    runs: dict[str, Callable[[], object]],
    repeats: int = 30,
    *,
    device: str = "cpu",
    budget: float = math.inf,
    calls_in_graph: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Time the callables in turn.

    Args:
        runs: name -> what to time. Each call should take the next set of a `Rotation`.
        repeats: rounds, each in another order and each sample after an untimed call, so that
            nobody pays for what a certain neighbour leaves behind (dirty cache lines above all).
        device: on "cuda" a sample is the replay of a graph of many calls. What waits for the device
            cannot be captured, and is launched call by call.
        budget: seconds for one callable. One that needs more sits rounds out, evenly spread, but
            is timed LEAST_SAMPLES times whatever it takes.
        calls_in_graph: calls that the graph holds, by name, see `rounds_in_graph`; else 20.
    """
    timers, captured = {}, {}
    for name, run in runs.items():
        captured[name] = device == "cuda" and never_waits(run)
        if captured[name]:
            timers[name] = _graph_timer(run, (calls_in_graph or {}).get(name, CALLS_IN_GRAPH))
        else:
            timers[name] = _call_timer(run, device)
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
    return {
        name: Timing(statistics.median(s), min(s), len(s), _spread(s), captured[name])
        for name, s in samples.items()
    }


def _spread(samples: list[float]) -> float:
    """How far two runs of the same differ: the earlier half of the samples and the later one."""
    if len(samples) < 2:
        return 0.0
    first, second = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    return abs(statistics.median(second) / statistics.median(first) - 1)


def never_waits(run: Callable) -> bool:
    """Whether a call never waits for the GPU. Asked first, since torch does not recover from a
    capture that fails."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as problem:
        if "synchroniz" not in str(problem):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def _call_timer(run: Callable, device: str) -> Callable[[], float]:
    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sample(calls: int) -> float:
        run()
        start = now()
        for _ in range(calls):
            run()
        return (now() - start) / calls

    calls = max(1, math.ceil(SHORTEST_SAMPLE / sample(1)))
    return lambda: sample(calls)


def _graph_timer(run: Callable, calls: int) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what is compiled or allocated once
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


def rounds_in_graph(sets: int) -> int:
    """Calls of a graph that visits every set the same even number of times, 20 calls or more.

    Even, so that what alternates between two states of a set does so at every replay too.
    """
    rounds = max(2, -(-CALLS_IN_GRAPH // sets))
    return (rounds + rounds % 2) * sets


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
