"""store_slots and append_rows: K and V of new tokens into an engine's pages, or behind those of
each sequence, beside indexed assignments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from harness.contenders import Against, Contender, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.probe import copy_probe
from ops.common import DTYPES, PAGE, expect, plain_contenders


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


def bench_append_rows(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: a decode step of each batch size, over sequences of unequal lengths."""
    run = replace(run, probe=copy_probe(run.device, run.probe.bytes))
    _, heads, dim = options.shape[0]
    tokens = min(options.tokens)
    for batch in options.batch:
        for dtype in options.dtype:
            new = 4 * batch * heads * dim * DTYPES[dtype].itemsize
            sets = [
                _ragged(batch, heads, tokens, dim, DTYPES[dtype], run.device)
                for _ in range(run.num_sets(new * tokens))
            ]
            contenders = [Contender("torch", _behind, new, ours=False)]
            for name in implementations("append_rows", run.device):
                call = partial(_from_here, OPS["append_rows"].impls[name])
                against = (Against("torch", "torch"),) if name != "reference" else ()
                contenders.append(Contender(name, call, new, against=against))
            expected = expect(
                "append_rows", tuple(x if x is None else x.clone() for x in sets[0]), _kept
            )
            contenders = [replace(x, expected=expected, results=_kept) for x in contenders]
            shape = f"B={batch} H={heads}x{dim} n={tokens}"
            yield measure("append_rows", shape, dtype, sets, contenders, run)


def _ragged(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, device: str
) -> tuple:
    """A step's rows as a model makes them, and caches."""
    k, v = torch.randn(2, batch, 1, heads, dim).to(device, dtype).transpose(2, 3)
    k_cache, v_cache = torch.zeros(2, batch, heads, tokens, dim, dtype=dtype, device=device)
    lens = torch.randint(tokens - 1, (batch,)).to(device, torch.int32)
    return k, v, k_cache, v_cache, lens, None, None, None, None


def _from_here(call: Callable, x: tuple) -> None:
    """Every call starts at the same lengths."""
    call(*x[:4], x[4].clone(), *x[5:])


def _behind(x: tuple) -> None:
    """In operations of torch: an indexed assignment for K and one for V, and the lengths."""
    k, v, k_cache, v_cache, lens = x[:5]
    row = torch.arange(len(k), device=k.device)[:, None]
    slot = lens.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    k_cache[row, :, slot] = k.transpose(1, 2)
    v_cache[row, :, slot] = v.transpose(1, 2)
    lens.clone().add_(k.shape[2])


def _kept(x: tuple, _: object) -> tuple:
    return x[2], x[3]


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
