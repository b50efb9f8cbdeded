"""Whole decode steps of a real model in vLLM: stock, kvcomp dense, and Delta."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from engine.processes import run_worker
from harness.record import Row
from kvcomp import models

WORKER = Path(__file__).with_name("worker.py")


def bench_serving(options: argparse.Namespace) -> Iterator[Row]:
    """Each setting is an engine of its own; the settings take turns, `rounds` times."""
    folder = models.resolve(options.model)
    settings = {
        "vllm": None,
        "kvcomp full": {"method": "full"},
        f"kvcomp delta {options.budget}": {"method": "delta", "budget": options.budget},
    }
    for batch in options.batch:
        for context in options.context:
            found: dict[str, list[float]] = {name: [] for name in settings}
            for turn in range(options.rounds):
                names = list(settings) if turn % 2 == 0 else list(settings)[::-1]
                for name in names:
                    job = {
                        "model": folder,
                        "kvcomp": settings[name],
                        "context": context,
                        "batch": batch,
                        "steps": options.steps,
                        "repeats": options.repeats,
                    }
                    found[name] += run_worker(WORKER, job, options.threads)
            base = found["vllm"]
            for name, seconds in found.items():
                median, minimum = statistics.median(seconds), min(seconds)
                yield Row(
                    "engine step",
                    f"{options.model}, {batch} x {context} tokens",
                    "bf16",
                    "cpu",
                    name,
                    ms=median * 1e3,
                    ms_min=minimum * 1e3,
                    ratios={"vllm": statistics.median(base) / median},
                    ratios_min={"vllm": min(base) / minimum},
                )
