"""Thinking for longer than the model knows: accuracy, K and V, and time by tokens of the output."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kvcomp
from delethink.stepper import Stepper, Window, drift, race, spread
from delethink.walks import Walks
from kvcomp import Delethink

TURNS = 16  # that each stepper takes within a window
# Half of Qwen3-0.6B in every width, so that two cores decode it in about 10 ms.
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 20,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class WindowRow:
    """What one chunk of Delethink generates, or dense attention in its place."""

    part: str
    method: str
    nodes: int | None
    chunk: int | None  # which one, from 1
    tokens: int  # thought in the end
    step_accuracy: float | None  # in the window
    ms: float  # per step, median without boundaries
    ms_min: float
    ms_mean: float  # with boundaries
    boundary_s: float
    kept_bytes: int  # of all sequences
    allocated_bytes: int
    peak_bytes: int  # so far

    def line(self) -> str:
        accuracy = "" if self.step_accuracy is None else f"  steps {self.step_accuracy:6.1%}"
        where = "" if self.nodes is None else f" {self.nodes:2} nodes"
        return (
            f"{self.part:7}{where} {self.method:10} {self.tokens:6} tokens{accuracy}"
            f"  {self.ms:6.2f} ms (min {self.ms_min:.2f}, with boundaries {self.ms_mean:.2f})"
            f"  KV {self.kept_bytes / 2**20:6.1f} MiB (peak {self.peak_bytes / 2**20:.1f})"
        )


@dataclass(frozen=True)
class BudgetRow:
    """The same answers, cut after a budget of thinking tokens."""

    part: str
    method: str
    nodes: int
    tokens: int
    step_accuracy: float
    answers_right: float  # share of answers without a wrong step

    def line(self) -> str:
        return (
            f"budget  {self.nodes:2} nodes {self.method:10} {self.tokens:6} tokens"
            f"  steps {self.step_accuracy:6.1%}  answers {self.answers_right:6.1%}"
        )


@dataclass(frozen=True)
class SummaryRow:
    """Whether it stays as it was. Growth is the largest over the smallest, less one."""

    part: str
    method: str
    nodes: int | None
    chunks: int
    first_accuracy: float | None  # of the first chunk, or as many tokens
    worst_accuracy: float | None  # of a later window
    last_accuracy: float | None
    ms_growth: float  # of the medians from chunk 2 on
    ms_min_growth: float  # of the minima
    ms_drift: float  # mean of those medians, later half of the chunks against earlier half
    ms_mean_growth: float  # of the means with boundaries, last chunk against chunk 2
    peak_growth: float  # of the peak, end against the first chunk's
    kept_growth: float  # from chunk 2 on

    def line(self) -> str:
        accuracy = (
            ""
            if self.first_accuracy is None
            else f" accuracy {self.first_accuracy:.1%} first, {self.worst_accuracy:.1%} worst,"
            f" {self.last_accuracy:.1%} last;"
        )
        return (
            f"{self.part}: {self.method}, {self.chunks} chunks:{accuracy} ms {self.ms_growth:+.0%}"
            f" (minima {self.ms_min_growth:+.0%}, drift {self.ms_drift:+.0%},"
            f" with boundaries {self.ms_mean_growth:+.0%}), peak KV {self.peak_growth:+.0%},"
            f" resident {self.kept_growth:+.0%}"
        )


Rows = WindowRow | BudgetRow | SummaryRow


def bench_scaling(options: argparse.Namespace) -> Iterator[Rows]:
    """The reasoner knows 4096 positions; the answers are longer."""
    stops = window_stops(options.chunk, options.carry, max(options.budgets))
    for nodes in options.nodes:
        walks = Walks(nodes, options.problems, stops[-1])
        steppers = {n: walks.stepper(m) for n, m in contestants(options).items()}
        windows = race(steppers, stops, TURNS)
        for name, stepper in steppers.items():
            right = walks.right(stepper.ids())
            yield from _rows("scaling", name, nodes, windows[name], right)
            for budget in options.budgets:
                part = right[:, :budget].float()
                yield BudgetRow(
                    "scaling",
                    name,
                    nodes,
                    budget,
                    part.mean().item(),
                    part.all(1).float().mean().item(),
                )
            stepper.close()


def bench_curve(options: argparse.Namespace) -> Iterator[Rows]:
    """A random model of a real shape, where attention and weights are what takes the time."""
    stops = window_stops(options.chunk, options.carry, max(options.budgets))
    model, prompt = real_model(options)
    steppers = {n: Stepper(model, m, prompt) for n, m in contestants(options).items()}
    windows = race(steppers, stops, TURNS)
    for name, stepper in steppers.items():
        yield from _rows("curve", name, None, windows[name], None)
        stepper.close()


def contestants(options: argparse.Namespace) -> dict[str, kvcomp.Method]:
    schedule = {"chunk": options.chunk, "carry": options.carry, "head": options.head}
    return {"delethink": Delethink(**schedule, max_chunks=None), "full": kvcomp.Full()}


def real_model(options: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """With a prompt of 256 tokens, or 16 in a smoke test."""
    torch.manual_seed(options.seed)
    shape = SHAPE | (TINY if options.smoke else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape)).eval()
    return model, torch.randint(shape["vocab_size"], (1, 16 if options.smoke else 256))


def window_stops(chunk: int, carry: int, tokens: int) -> list[int]:
    """The first chunk's end, and that of each later one; at least `tokens` in all."""
    stops = [chunk]
    while stops[-1] < tokens:
        stops.append(stops[-1] + chunk - carry)
    return stops


def _rows(
    part: str,
    method: str,
    nodes: int | None,
    windows: list[Window],
    right: Tensor | None,
) -> Iterator[Rows]:
    accuracies = [
        None if right is None else right[:, w.start : w.stop].float().mean().item() for w in windows
    ]
    for index, (window, accuracy) in enumerate(zip(windows, accuracies, strict=True)):
        facts = {k: v for k, v in vars(window).items() if k not in ("start", "stop")}
        chunk = index + 1 if method == "delethink" else None
        yield WindowRow(part, method, nodes, chunk, window.stop, accuracy, **facts)
    later = windows[1:]
    yield SummaryRow(
        f"{part} summary",
        method,
        nodes,
        len(windows),
        accuracies[0],
        None if right is None else min(accuracies[1:]),
        accuracies[-1],
        spread([w.ms for w in later]),
        spread([w.ms_min for w in later]),
        drift([w.ms for w in later]),
        later[-1].ms_mean / later[0].ms_mean - 1,
        windows[-1].peak_bytes / windows[0].peak_bytes - 1,
        spread([w.kept_bytes for w in later]),
    )
