"""store_slots: K and V of new tokens into an engine's pages, beside an indexed assignment."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from harness.contenders import Settings, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.probe import copy_probe
from ops.common import DTYPES, PAGE, plain_contenders


def bench_store_slots(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: a decode step of each batch size, and a piece of a prompt."""
    run = replace(run, probe=copy_probe(run.device, run.probe.bytes))
    _, heads, dim = options.shape[0]
    for tokens in (*options.batch, min(options.tokens)):
        for dtype in options.dtype:
            moved = 4 * tokens * heads * dim * DTYPES[dtype].itemsize
            count = run.num_sets(moved)
            sets = [_new(tokens, heads, dim, DTYPES[dtype], run.device) for _ in range(count)]
            contenders = plain_contenders(
                "store_slots", sets[0], moved, {"torch": _indexed}, run, written=(2, 3)
            )
            shape = f"n={tokens} H={heads}x{dim} page={PAGE}"
            yield measure("store_slots", shape, dtype, sets, contenders, run)


def _new(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple:
    """New rows, a pool of twice as many slots in vLLM's order, and where the rows go."""
    pages = -(-2 * tokens // PAGE)
    k, v = torch.randn(2, tokens, heads, dim).to(device, dtype)
    cache = torch.zeros(pages, PAGE, heads, 2 * dim, dtype=dtype, device=device).transpose(1, 2)
    slots = torch.randperm(pages * PAGE)[:tokens].to(device)
    return k, v, *cache.split(dim, -1), slots


def _indexed(x: tuple) -> None:
    """In operations of torch."""
    OPS["store_slots"].reference(*x)
