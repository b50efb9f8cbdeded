"""Whole decode steps of a real model in vLLM: stock, kvcomp dense, and Delta."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
                    found[name] += _run(job, options.threads)
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


def _run(job: dict, threads: int) -> list[float]:
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"bench_engine: the engine ended without a result:\n{done.stderr}")
    return json.loads(found[0].removeprefix("RESULT "))
