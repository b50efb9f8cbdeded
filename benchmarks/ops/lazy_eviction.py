"""What LazyEviction costs a layer: the tracking of a decode step, and an eviction.

"decode" is the attention of a step alone; "tracked" also writes the logits and marks the hits;
"tracked, all" adds a 32nd of a replay of 32 steps: what it takes longer than "decode" is the
overhead. "evict" is `LazyEviction.evict` on a layer of a real cache, in the steady state: scores,
positions, the choice, the compaction, and all Python between them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from harness.contenders import Settings, timed
from harness.record import Row
from harness.timing import Timing
from kvcomp import LazyEviction, ops
from kvcomp.cache import KVCache
from kvcomp.ops.recurrence_update import MAX_STEPS
from ops.common import DTYPES, PEAK, empty_logits


class Step(NamedTuple):
    """A cache of one layer, in the steady state."""

    cache: KVCache
    q: Tensor
    k: Tensor  # the whole slab
    v: Tensor
    lens: Tensor  # halfway from an eviction to the next
    logits: Tensor
    hits: Tensor  # [B, 32, Hkv, W]
    replayed: tuple[Tensor, Tensor]  # last hits and longest intervals [B, Hkv, slots], for replay
    born: Tensor
    silence: Tensor  # [B, Hkv, slots], when an eviction comes
    longest: Tensor  # [B, Hkv, window], intervals of the newest tokens then


def bench_lazy_eviction(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    for heads, kv_heads, dim in options.shape:
        first = (heads, kv_heads, dim) == options.shape[0]
        for batch in (1, 8) if first else (1,):
            for dtype in options.dtype:
                sizes = batch, heads, kv_heads, dim
                yield _bench_layer(sizes, *options.evictions[0], dtype, run)


def _bench_layer(
    sizes: tuple[int, int, int, int], budget: int, window: int, dtype: str, run: Settings
) -> list[Row]:
    batch, heads, kv_heads, dim = sizes
    length = budget + window // 2
    num_bytes = 2 * batch * kv_heads * length * dim * DTYPES[dtype].itemsize
    method = LazyEviction(budget=budget, window=window)
    count = run.num_sets(num_bytes)
    one = torch.empty(batch, heads, dim, dtype=DTYPES[dtype], device=run.device)
    logits = empty_logits(one, budget + window)  # as layers share it
    steps = [_layer(method, sizes, length, DTYPES[dtype], logits) for _ in range(count)]
    calls = {
        "decode": _decode,
        "tracked": lambda x: _tracked(x, method.threshold),
        "replay": _replay,
        "refill": lambda x: _refill(x, method),
        "refill, evict": lambda x: _evict(x, method),
    }
    timings = timed(steps, calls, replace(run, repeats=5 * run.repeats))  # small differences
    decode, tracked, replay = (timings[name] for name in ("decode", "tracked", "replay"))
    shape = f"B={batch} {heads}/{kv_heads}x{dim} n={length}"
    rows = []

    def row(name: str, timing: Timing, *, overhead: bool = False) -> Row:
        row = Row("lazy_eviction", shape, dtype, run.device, name)
        row.ms, row.ms_min = timing.median * 1e3, timing.minimum * 1e3
        row.spread, row.in_graph = timing.spread, timing.in_graph
        if overhead:
            row.overhead = timing.median / decode.median - 1
            row.overhead_min = timing.minimum / decode.minimum - 1
        rows.append(row)
        return row

    evict = _combined(timings["refill, evict"], timings["refill"], -1)
    row("decode", decode)
    row("tracked", tracked, overhead=True)
    row("replay of 32", replay)
    row("tracked, all", _combined(tracked, replay, 1 / MAX_STEPS), overhead=True)
    last = row("evict", evict)
    last.ratios["decode"] = decode.median / evict.median
    last.ratios_min["decode"] = decode.minimum / evict.minimum
    return rows


def _combined(a: Timing, b: Timing, weight: float) -> Timing:
    median = max(a.median + weight * b.median, 1e-9)
    minimum = max(a.minimum + weight * b.minimum, 1e-9)
    spread = (a.spread * a.median + abs(weight) * b.spread * b.median) / median
    return Timing(median, minimum, min(a.samples, b.samples), spread, a.in_graph and b.in_graph)


def _layer(
    method: LazyEviction,
    sizes: tuple[int, int, int, int],
    length: int,
    dtype: torch.dtype,
    logits: Tensor,
) -> Step:
    """The layer of a cache, after some evictions."""
    batch, heads, kv_heads, dim = sizes
    device = logits.device
    slots, words = method.budget + method.window, -(-(method.budget + method.window) // 32)
    cache = KVCache(method, 1)
    layer = cache.layers[0]
    k, v = (torch.randn(batch, kv_heads, slots, dim, device=device).to(dtype) for _ in "kv")
    q = (torch.randn(batch, heads, dim, device=device) * PEAK).to(dtype)
    layer.append(k, v)
    cache.prefill(layer, q[:, :, None], dim**-0.5)
    bits = torch.randint(-(2**31), 2**31, (4, batch, MAX_STEPS, kv_heads, words), device=device)
    # A third of the tokens has never been hit; the others pause for about as long as real ones do.
    pauses = torch.rand(2, batch, kv_heads, slots, device=device).log().mul(-60).int() + 1
    pauses[1].masked_fill_(torch.rand_like(pauses[1], dtype=torch.float32) < 1 / 3, 0)
    x = Step(
        cache,
        q,
        k,
        v,
        torch.full_like(layer.seq_lens, length),
        logits,
        (bits[0] & bits[1] & bits[2] & bits[3]).int(),  # one in sixteen
        (pauses[0].clone(), pauses[1].clone()),
        torch.zeros_like(layer.seq_lens),
        pauses[0],
        pauses[1][..., method.budget :].clone(),
    )
    for _ in range(4):
        _evict(x, method)
    _refill(x, method)
    return x._replace(k=layer.keys, v=layer.values)


def _decode(x: Step) -> Tensor:
    return ops.decode_attention(x.q, x.k, x.v, x.lens)[0]


def _tracked(x: Step, alpha: float) -> Tensor:
    out, lse = ops.decode_attention(x.q, x.k, x.v, x.lens, logits=x.logits)
    ops.attention_hits(x.logits, lse, x.lens, x.hits[:, 0], alpha)
    return out


def _replay(x: Step) -> None:
    ops.recurrence_update(x.hits, *x.replayed, x.lens, x.born, 10_000)


def _refill(x: Step, method: LazyEviction) -> None:
    """What `window` decode steps leave behind, all but K and V, whose contents do not matter."""
    layer = x.cache.layers[0]
    x.cache.steps += method.window
    layer.logical_lens += method.window
    layer.max_len = method.budget + method.window
    layer.seq_lens.fill_(layer.max_len)
    slots = layer.slots
    torch.sub(x.cache.steps, x.silence, out=slots["last_hit"][..., : layer.max_len])
    slots["longest"][..., method.budget : layer.max_len] = x.longest


def _evict(x: Step, method: LazyEviction) -> None:
    _refill(x, method)
    method.evict(x.cache.layers[0])
