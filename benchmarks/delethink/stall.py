"""How long decoding stands still at a boundary, and what it costs to have that done beforehand.

Steppers take turns by whole chunks, just behind a boundary: there no background is at work.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from delethink.scaling import real_model
from delethink.stepper import Stepper, race
from kvcomp import Delethink

BUSY = 1.3  # CPU seconds per second, above which a second thread is at work


@dataclass(frozen=True)
class StallRow:
    part: str
    reset: str
    piece: int | None
    threads: int
    cores: int
    core_free: bool
    chunk: int
    carry: int
    head: int
    boundaries: int
    stall_s: float  # median
    stall_s_min: float
    hidden: float | None  # 1 - stall / that of "prefill", by medians; None: no core to hide it on
    hidden_min: float | None  # by minima
    step_ms: float  # median without boundaries, nothing else under way
    busy_ms: float | None  # median while the background encodes
    busy_share: float  # of the steps
    tokens_per_second: float  # behind the first boundary, the others included
    peak_bytes: int

    def line(self) -> str:
        name = self.reset if self.piece is None else f"{self.reset}, pieces of {self.piece}"
        hidden = (
            "" if self.hidden is None else f"  hidden {self.hidden:.0%} (min {self.hidden_min:.0%})"
        )
        busy = (
            ""
            if self.busy_ms is None
            else f", {self.busy_ms:.2f} ms in the {self.busy_share:.0%} beside which it encodes"
        )
        return (
            f"{self.threads} of {self.cores} cores  {name:24} stall {1e3 * self.stall_s:6.0f} ms"
            f" (min {1e3 * self.stall_s_min:.0f}){hidden}  step {self.step_ms:.2f} ms{busy}"
            f"  {self.tokens_per_second:.1f} tokens/s  KV peak {self.peak_bytes / 2**20:.1f} MiB"
        )


def bench_stall(options: argparse.Namespace) -> Iterator[StallRow]:
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        free = cores > torch.get_num_threads()
        print(
            f"decoding with {threads} of {cores} cores: "
            + ("one is free for the background" if free else "none is free for the background"),
            flush=True,
        )
        yield from _rows(options, threads, cores, free)
    torch.set_num_threads(before)


def _rows(
    options: argparse.Namespace, threads: int, cores: int, core_free: bool
) -> Iterator[StallRow]:
    chunk, carry, head = options.chunk, options.carry, options.head
    schedule = {"chunk": chunk, "carry": carry, "head": head, "max_chunks": None}
    methods = {"prefill": Delethink(**schedule)}
    for piece in options.pieces:
        methods[f"streaming {piece}"] = Delethink(**schedule, reset="streaming", piece=piece)
    model, prompt = real_model(options)
    steppers = {name: Stepper(model, method, prompt) for name, method in methods.items()}
    race(steppers, [chunk + 1 + n * (chunk - carry) for n in range(options.stall_boundaries)])
    whole = steppers["prefill"].run.meter.boundary_seconds
    for name, stepper in steppers.items():
        stepper.close()
        streaming, stalls = name != "prefill", stepper.run.meter.boundary_seconds
        hides = streaming and core_free
        watched = streaming and threads == 1  # more threads use more than one core at any time
        quiet, busy = [], []
        for seconds, stall, cpu in zip(stepper.seconds, stepper.stalls, stepper.cpu, strict=True):
            if not stall:
                (busy if watched and cpu / seconds > BUSY else quiet).append(seconds)
        yield StallRow(
            "stall",
            stepper.method.reset,
            stepper.method.piece if streaming else None,
            threads,
            cores,
            core_free,
            chunk,
            carry,
            head,
            len(stalls),
            statistics.median(stalls),
            min(stalls),
            1 - statistics.median(stalls) / statistics.median(whole) if hides else None,
            1 - min(stalls) / min(whole) if hides else None,
            1e3 * statistics.median(quiet),
            1e3 * statistics.median(busy) if busy else None,
            len(busy) / (len(busy) + len(quiet)),
            1e3 / stepper.window(chunk + 1).ms_mean,
            stepper.run.meter.peak_bytes,
        )
