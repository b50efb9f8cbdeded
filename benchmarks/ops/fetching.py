"""fetch_rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.probe import copy_probe, link_probe
from ops.common import DTYPES, in_order

CLUSTER, BUDGET, SINKS, LOCAL = 16, 1024, 16, 256  # LouisKV's, in tokens


class Exchange(NamedTuple):
    """Slots that hold one of two sets of rows, and take the other by turns."""

    k: Tensor  # [1, H, T, D]
    v: Tensor
    slot_rows: Tensor  # [1, H, T]: sinks, retrieved rows, local ones
    lens: Tensor
    lists: list[Tensor]  # two of [1, H, K], the first is resident
    first_local: Tensor
    active: Tensor
    pool: list[Tensor]  # one block, shared by all sets

    def turn(self) -> Tensor:
        """The rows that are wanted now."""
        self.lists.reverse()
        return self.lists[0]


def bench_fetch_rows(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: other sets have been exchanged since. A third of the wanted rows is missing, or all.

    `refetch` brings all that is wanted, `torch-delta` what is missing, `copies` that row by row.
    On a GPU what counts is what comes over the link, and the probe is one large copy over it.
    """
    on_gpu = run.device == "cuda"
    size = run.probe.bytes
    run = replace(run, probe=link_probe(size) if on_gpu else copy_probe(run.device, size))
    _, heads, dim = options.shape[0]
    rows = max(options.tokens)
    budget = min(BUDGET, rows // 4)
    for missing in (1 / 3, 1.0):
        for dtype in options.dtype:
            block = torch.randn(1, heads, rows, 2, dim).to(DTYPES[dtype])
            pool = [block.pin_memory() if on_gpu else block]
            new = round(missing * budget / CLUSTER) * CLUSTER
            moved = (2 if on_gpu else 4) * heads * new * dim * DTYPES[dtype].itemsize
            sets = [_exchange(pool, budget, new, run.device) for _ in range(run.num_sets(moved))]
            shape = f"B=1 H={heads}x{dim} K={budget} missing={new}"
            contenders = list(_fetch_contenders(sets[0], moved, run))
            yield measure("fetch_rows", shape, dtype, sets, contenders, run)


def _exchange(pool: list[Tensor], budget: int, new: int, device: str) -> Exchange:
    """Wanted are units of 16 rows, of which budget - new are in both sets."""
    _, heads, rows, _, _ = pool[0].shape
    units, count = rows // CLUSTER - 1, (budget + new) // CLUSTER  # the first holds the sinks
    chosen = 1 + torch.stack([torch.randperm(units)[:count] for _ in range(heads)])
    chosen = (chosen[..., None] * CLUSTER + torch.arange(CLUSTER)).flatten(1).int()
    lists = [chosen[:, :budget], chosen[:, new:]]
    sinks = torch.arange(SINKS).int().expand(heads, -1)
    local = rows + torch.arange(LOCAL).int().expand(heads, -1)
    held = torch.cat([sinks, lists[0], local], 1)[None].to(device)
    inside = (held % rows).long().to(pool[0].device)  # of the local ones K and V do not matter
    k, v = pool[0].take_along_dim(inside[..., None, None], 2).to(device).unbind(3)
    k, v = k.contiguous(), v.contiguous()
    integers = partial(torch.full, (1,), dtype=torch.int32, device=device)
    lists = [x.sort(-1).values[None].to(device) for x in lists]
    return Exchange(k, v, held, integers(held.shape[2]), lists, integers(rows), integers(1), pool)


def _refetch(x: Exchange) -> None:
    rows, block = x.turn(), x.pool[0]
    heads, count = rows.shape[1:]
    first = torch.arange(heads, device=rows.device)[:, None] * block.shape[2]
    index = (rows[0] + first).flatten().to(block.device)  # among the rows of all heads
    taken = block.flatten(0, 2).index_select(0, index).to(rows.device)
    span = slice(SINKS, SINKS + count)
    x.k[0, :, span], x.v[0, :, span] = taken.unflatten(0, (heads, count)).unbind(2)
    x.slot_rows[..., span] = rows


def _missing(x: Exchange) -> tuple[Tensor, Tensor, Tensor]:
    """Head, row and free slot of what is wanted and not held, by a table of each."""
    rows, block, held = x.turn()[0].long(), x.pool[0][0], x.slot_rows[0]
    span = held[:, SINKS : SINKS + rows.shape[1]]
    have, want = (
        torch.zeros(block.shape[:2], dtype=torch.bool, device=rows.device).scatter_(1, r, True)
        for r in (span.long(), rows)
    )
    head, place = (~have.gather(1, rows)).nonzero(as_tuple=True)
    _, slot = (~want.gather(1, span.long())).nonzero(as_tuple=True)  # as many, head by head
    slot, row = slot + SINKS, rows[head, place]
    held[head, slot] = row.int()
    return head, row, slot


def _torch_delta(x: Exchange) -> None:
    head, row, slot = _missing(x)
    block = x.pool[0][0]
    taken = block[head.to(block.device), row.to(block.device)].to(head.device)
    x.k[0, head, slot], x.v[0, head, slot] = taken.unbind(1)


def _copies(x: Exchange) -> None:
    """Two asynchronous copies a row."""
    block = x.pool[0][0]
    for head, row, slot in zip(*(t.tolist() for t in _missing(x)), strict=True):
        x.k[0, head, slot].copy_(block[head, row, 0], non_blocking=True)
        x.v[0, head, slot].copy_(block[head, row, 1], non_blocking=True)


def _fetch_contenders(x: Exchange, moved: int, run: Settings) -> Iterator[Contender]:
    def results(x: Exchange, _: object) -> tuple[Tensor, ...]:
        return in_order(x.k, x.v, x.slot_rows)

    def fetch(x: Exchange, impl: Callable) -> None:
        impl(x.k, x.v, x.slot_rows, x.lens, x.turn(), x.first_local, x.active, x.pool, SINKS)

    reference = OPS["fetch_rows"].reference

    def changed(*args: object) -> tuple[Tensor, ...]:
        copy = Exchange(*args)
        copy = copy._replace(
            k=copy.k.clone(),
            v=copy.v.clone(),
            slot_rows=copy.slot_rows.clone(),
            lens=copy.lens.clone(),
            lists=list(copy.lists),
        )
        fetch(copy, reference)
        return results(copy, None)

    expected = Expected(changed, x, exact=True)
    baselines = {"refetch": _refetch, "torch-delta": _torch_delta}
    if run.device == "cuda":
        baselines["copies"] = _copies
    for name, call in baselines.items():
        yield Contender(name, call, moved, expected=expected, ours=False, results=results)
    for name in implementations("fetch_rows", run.device):
        call = partial(fetch, impl=OPS["fetch_rows"].impls[name])
        against = tuple(Against(b, b) for b in baselines) if name != "reference" else ()
        yield Contender(name, call, moved, "", expected, against=against, results=results)
