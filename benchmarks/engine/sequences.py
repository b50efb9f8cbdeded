"""How many sequences a pool of blocks holds at once: stock vLLM, and methods that give blocks back.

Nothing is timed. An engine decodes more and more requests together, until vLLM must preempt one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.processes import run_worker
from kvcomp import models

WORKER = Path(__file__).with_name("pool_worker.py")
BLOCK, BLOCKS, PROMPT, TOKENS = 32, 129, 64, 960  # one of the blocks is vLLM's own null block
BUDGET, WINDOW = 224, 32  # together a quarter of a finished sequence


@dataclass(frozen=True)
class Fit:
    """Sequences that a pool holds without a preemption."""

    setting: str
    sequences: int
    over_vllm: float

    def line(self) -> str:
        room = f"{BLOCKS - 1} blocks of {BLOCK} tokens, {PROMPT} + {TOKENS} tokens each"
        return f"{self.setting:28} {self.sequences:3} sequences ({self.over_vllm:.2f}x)  {room}"


def bench_sequences(options: argparse.Namespace) -> Iterator[Fit]:
    """Stock vLLM, the window with sinks, and LazyEviction, at a quarter of the tokens."""
    lazy = {"method": "lazy-eviction", "budget": BUDGET, "window": WINDOW, "alpha": 0.2}
    settings = {
        "vllm": None,
        "kvcomp sink-window": {"method": "sink-window", "budget": BUDGET + WINDOW, "sinks": 4},
        "kvcomp lazy-eviction": lazy,
    }
    stock = 0
    for name, method in settings.items():
        job = {
            "model": models.resolve("reasoner"),
            "kvcomp": method,
            "engine": {"block_size": BLOCK, "num_gpu_blocks_override": BLOCKS},
            "prompt": PROMPT,
            "tokens": TOKENS,
            "first": max(1, 2 * stock),
        }
        found = run_worker(WORKER, job, options.threads)
        stock = stock or found
        yield Fit(name, found, found / stock)
