"""A model under one method that decodes greedily, a step at a time, so that several can take turns.

Windows are cut by tokens of the output. The step that crosses a boundary makes the first token of
the next chunk, so that a window which begins with a chunk has the boundary in it.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvcomp
from kvcomp import Method


@dataclass(frozen=True)
class Window:
    """Output[start:stop] of all rows; milliseconds per step, bytes of K and V of all rows."""

    start: int
    stop: int
    ms: float  # median, without boundaries
    ms_min: float
    ms_mean: float  # with boundaries
    boundary_s: float  # all boundaries in the window
    kept_bytes: int  # in the end
    allocated_bytes: int
    peak_bytes: int  # so far


@dataclass
class Stepper:
    """
    Args:
        model: copied, since a model has one method at a time.
        prompt: [B, T] ids, without padding.

    Attributes:
        output: one [B, 1] of ids per token.
        seconds, stalls, cpu: of each step: all of it, the boundary in it, CPU time of the process.
    """

    model: PreTrainedModel
    method: Method
    prompt: Tensor
    output: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.run = kvcomp.patch(self.model, self.method)
        self.cache = self.run.new_cache()
        self.logits = self._forward(self.prompt)  # [B, V] for the token that comes next
        self.output.append(self.logits.argmax(-1, keepdim=True))

    def close(self) -> None:
        self.run.undo()

    def step(self, token: Tensor | None = None) -> None:
        """Feed `token`, or the one that was chosen, and choose the next."""
        if token is not None:
            self.output[-1] = token
        stalls, cpu = self.run.meter.boundary_seconds, time.process_time()
        crossed, start = len(stalls), time.perf_counter()
        self.logits = self._forward(self.output[-1])
        self.output.append(self.logits.argmax(-1, keepdim=True))
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - cpu)
        self.stalls.append(sum(stalls[crossed:]))

    def decode(self, tokens: int) -> None:
        """Go on until there are so many tokens of output."""
        while len(self.output) < tokens:
            self.step()

    def window(self, start: int) -> Window:
        """What was decoded from token `start` on; the first token came with the prompt."""
        first = max(start, 1) - 1
        seconds, stalls = self.seconds[first:], self.stalls[first:]
        plain = [a - b for a, b in zip(seconds, stalls, strict=True)]
        report = self.run.report()
        return Window(
            start,
            len(self.output),
            1e3 * statistics.median(plain),
            1e3 * min(plain),
            1e3 * statistics.mean(seconds),
            sum(stalls),
            report.kv_bytes_kept,
            report.kv_bytes_allocated,
            report.kv_bytes_peak,
        )

    def ids(self) -> Tensor:
        """[B, tokens]"""
        return torch.cat(self.output, 1)

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]


def race(
    steppers: dict[str, Stepper], stops: Iterable[int], slices: int = 1, seed: int = 0
) -> dict[str, list[Window]]:
    """All decode up to each of `stops`, taking turns `slices` times on the way."""
    windows: dict[str, list[Window]] = {name: [] for name in steppers}
    order, start = random.Random(seed), 0
    for stop in stops:
        for part in range(1, slices + 1):
            for name in order.sample(list(steppers), len(steppers)):
                steppers[name].decode(start + (stop - start) * part // slices)
        for name, stepper in steppers.items():
            windows[name].append(stepper.window(start))
        start = stop
    return windows


def spread(values: Sequence[float]) -> float:
    """How much the largest is above the smallest, as a share."""
    return max(values) / min(values) - 1


def drift(values: Sequence[float]) -> float:
    """How much the later half is above the earlier one in the mean, as a share."""
    half = len(values) // 2
    return statistics.mean(values[-half:]) / statistics.mean(values[:half]) - 1
