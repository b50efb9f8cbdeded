"""compact_kv, select_victims, recurrence_update, attention_hits and rotate_keys."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.ops.recurrence_update import MAX_STEPS
from kvcomp.probe import copy_probe
from ops.common import DTYPES, dtype_name, in_order, plain_contenders, random_logits

ALPHA = 1e-4  # a token's probability from which on it counts as hit

# --- compact_kv -----------------------------------------------------------------------------------


class Slab(NamedTuple):
    """A full cache of budget + window tokens, of which `window` leave; one set for a head."""

    k: Tensor  # [B, H, budget + window, D]
    v: Tensor
    position: Tensor  # [B, H, budget + window], moves along
    victims: Tensor  # [B, H, window], none among the newest `window`, which are the last
    lens: Tensor
    kept: Tensor  # [B, H, budget] int64, given to PyTorch for nothing
    flat: Tensor  # the same among the rows of all heads
    spare: tuple[Tensor, Tensor, Tensor]  # as large as what stays, and used by turns


def bench_compact_kv(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold. Contents do not matter, so the same tokens can leave again and again."""
    run = replace(run, probe=copy_probe(run.device, run.probe.bytes))
    _, heads, dim = options.shape[0]
    for budget, window in options.evictions:
        for batch in (1, 8) if (budget, window) == options.evictions[0] else (1,):
            for dtype in options.dtype:
                row_bytes = 2 * dim * DTYPES[dtype].itemsize + 4
                holes = window * budget // (budget + window - _protected(budget, window))
                moved = 2 * batch * heads * holes * row_bytes  # read and written
                sets = _slabs(batch, heads, dim, budget, window, DTYPES[dtype], moved, run)
                contenders = list(_compact_contenders(sets[0], moved, run))
                shape = f"B={batch} H={heads}x{dim} {budget}+{window}"
                yield measure("compact_kv", shape, dtype, sets, contenders, run)


def _protected(budget: int, window: int) -> int:
    """Newest tokens of which none leaves: a window, but none where half of all tokens leave."""
    return window if 2 * window <= budget else 0


def _slabs(
    batch: int,
    heads: int,
    dim: int,
    budget: int,
    window: int,
    dtype: torch.dtype,
    moved: int,
    run: Settings,
) -> list[Slab]:
    total, older = budget + window, budget + window - _protected(budget, window)
    generator = torch.Generator(run.device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=run.device)
    k, v = (random(batch, heads, total, dim, dtype=dtype) for _ in "kv")
    integers = partial(torch.arange, dtype=torch.int32, device=run.device)
    position = integers(total).expand(batch, heads, -1)
    lens = integers(1).new_full((batch,), total)
    first_row = torch.arange(batch * heads, device=run.device).view(batch, heads, 1) * total
    sets = []
    for _ in range(run.num_sets(moved)):
        noise = torch.rand(batch, heads, older, generator=generator, device=run.device)
        order = noise.argsort(-1)
        newest = torch.arange(older, total, device=run.device).expand(batch, heads, -1)
        kept = torch.cat([order[..., window:], newest], -1).sort(-1).values
        sets.append(
            Slab(
                k.clone(),
                v.clone(),
                position.clone(),
                order[..., :window].sort(-1).values.int(),
                lens,
                kept,
                (kept + first_row).flatten(),
                tuple(t[:, :, window:].clone() for t in (k, v, position)),  # pages there already
            )
        )
    return sets


def _gather(x: Slab) -> tuple[Tensor, ...]:
    index = x.kept[..., None].expand(-1, -1, -1, x.k.shape[-1])
    return x.k.gather(2, index), x.v.gather(2, index), x.position.gather(2, x.kept)


def _index_select_out(x: Slab) -> tuple[Tensor, ...]:
    """Into memory that is there already: a second buffer for every layer."""
    for source, target in zip((x.k, x.v), x.spare, strict=False):
        dim = source.shape[-1]
        torch.index_select(source.view(-1, dim), 0, x.flat, out=target.view(-1, dim))
    torch.index_select(x.position.view(-1), 0, x.flat, out=x.spare[2].view(-1))
    return x.spare


def _compact_contenders(x: Slab, moved: int, run: Settings) -> Iterator[Contender]:
    expected = Expected(in_order, _gather(x), exact=True)
    kept = x.kept.shape[-1]

    def returned(_: Slab, result: tuple) -> tuple[Tensor, ...]:
        return in_order(*result)

    def in_place(x: Slab, _: object) -> tuple[Tensor, ...]:
        return in_order(x.k[:, :, :kept], x.v[:, :, :kept], x.position[..., :kept])

    baselines = {"gather": _gather, "index-select-out": _index_select_out}
    for name, call in baselines.items():
        yield Contender(name, call, moved, expected=expected, ours=False, results=returned)
    for name in implementations("compact_kv", run.device):

        def compact(x: Slab, impl: Callable = OPS["compact_kv"].impls[name]) -> None:
            impl(x.k, x.v, [x.position], x.victims, x.lens)

        against = tuple(Against(b, b) for b in baselines) if name != "reference" else ()
        yield Contender(name, compact, moved, "", expected, against=against, results=in_place)


# --- select_victims -------------------------------------------------------------------------------


def bench_select_victims(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: scores and positions have just been computed.

    "tied": half of the tokens have never been hit and share the lowest score, which is where the
    rule for ties costs something; torch.topk has none.
    """
    for total, count in options.victims:
        for units in options.units:
            for tied in (False, True):
                sets = [_scored_slots(units, total, count, tied, run.device) for _ in range(8)]
                moved = units * (8 * total + 4 * count)
                trust = ("topk",) if tied else ()
                baselines = {"topk": _topk_victims, "sort": _sorted_victims}
                contenders = plain_contenders(
                    "select_victims", sets[0], moved, baselines, run, trust=trust
                )
                shape = f"B=1 U={units} N={total} V={count}" + " tied" * tied
                yield measure("select_victims", shape, "fp32", sets, contenders, run)


def _scored_slots(units: int, total: int, count: int, tied: bool, device: str) -> tuple:
    scores = torch.rand(1, units, total, device=device)
    positions = torch.rand(1, units, total, device=device).argsort(-1).int()  # anywhere
    if tied:
        scores = torch.where(scores < 0.5, 0.0, scores)
    lens = torch.full((1,), total, dtype=torch.int32, device=device)
    return scores, positions, lens, lens - count, count, count


def _candidate_scores(scores: Tensor, positions: Tensor, num_recent: int) -> Tensor:
    last = positions.amax(-1, keepdim=True)
    return scores.masked_fill(positions > last - num_recent, torch.inf)


def _topk_victims(x: tuple) -> Tensor:
    scores, positions, _, _, count, num_recent = x
    candidates = _candidate_scores(scores, positions, num_recent)
    return candidates.topk(count, largest=False, sorted=False).indices.int().sort(-1).values


def _sorted_victims(x: tuple) -> Tensor:
    """With the rule for ties: a stable sort of the scores in the order of age."""
    scores, positions, _, _, count, num_recent = x
    by_age = positions.argsort(-1)
    candidates = _candidate_scores(scores, positions, num_recent).gather(-1, by_age)
    first = candidates.sort(dim=-1, stable=True).indices[..., :count]
    return by_age.gather(-1, first).int().sort(-1).values


# --- recurrence_update ----------------------------------------------------------------------------


class Tracked(NamedTuple):
    """The arguments of the op, and the hits as PyTorch would have them."""

    hits: Tensor  # [B, 32, U, W]
    last_hit: Tensor
    longest: Tensor
    lens: Tensor
    born: Tensor
    first_step: int
    marks: Tensor  # [32, B, U, N] bool, given to PyTorch for nothing


def bench_recurrence_update(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm to lukewarm: the bits of 32 steps. The same steps can be replayed again."""
    _, kv_heads, _ = options.shape[0]
    for total, _ in options.victims:
        for batch in (1, 8):
            sets = [_tracked(batch, kv_heads, total, run.device) for _ in range(8)]
            # The bits, and two integers a token read and written.
            moved = batch * kv_heads * (MAX_STEPS * total // 8 + 16 * total)
            contenders = list(_recurrence_contenders(sets[0], moved, run))
            shape = f"B={batch} U={kv_heads} N={total} R={MAX_STEPS}"
            yield measure("recurrence_update", shape, "fp32", sets, contenders, run)


def _tracked(batch: int, units: int, total: int, device: str) -> Tracked:
    words = -(-total // 32)
    marks = torch.rand(MAX_STEPS, batch, units, words * 32, device=device) < 0.1
    weights = 1 << torch.arange(32, device=device)
    bits = (marks.unflatten(-1, (words, 32)) * weights).sum(-1)
    hits = (bits - ((bits >> 31) << 32)).int().transpose(0, 1).contiguous()
    first_step = 10_000
    last_hit = first_step - torch.randint(1, 500, (batch, units, total), device=device).int()
    longest = torch.randint(0, 300, (batch, units, total), device=device).int()
    lens = torch.full((batch,), total, dtype=torch.int32, device=device)
    marks = marks[..., :total].contiguous()
    return Tracked(hits, last_hit, longest, lens, torch.zeros_like(lens), first_step, marks)


def _step_by_step(x: Tracked) -> None:
    """As it would be tracked at every step: three passes over two integers a token."""
    for row, hit in enumerate(x.marks):
        step = x.first_step + row
        interval = torch.maximum(x.longest, step - x.last_hit)
        x.longest.copy_(torch.where(hit, interval, x.longest))
        x.last_hit.masked_fill_(hit, step)


def _recurrence_contenders(x: Tracked, moved: int, run: Settings) -> Iterator[Contender]:
    def results(x: Tracked, _: object) -> tuple[Tensor, Tensor]:
        return x.last_hit, x.longest

    reference = OPS["recurrence_update"].reference

    def replayed(*args: object) -> tuple[Tensor, Tensor]:
        copy = Tracked(*args)._replace(last_hit=x.last_hit.clone(), longest=x.longest.clone())
        reference(*copy[:-1])
        return results(copy, None)

    expected = Expected(replayed, x, exact=True)
    baselines = {
        "torch-replay": lambda x: reference(*x[:-1]),
        "torch-each-step": _step_by_step,
    }
    for name, call in baselines.items():
        yield Contender(name, call, moved, expected=expected, ours=False, results=results)
    for name in implementations("recurrence_update", run.device):

        def replay(x: Tracked, impl: Callable = OPS["recurrence_update"].impls[name]) -> None:
            impl(*x[:-1])

        against = tuple(Against(b, b) for b in baselines) if name != "reference" else ()
        yield Contender(name, replay, moved, "", expected, against=against, results=results)


# --- attention_hits -------------------------------------------------------------------------------


def bench_attention_hits(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: the logits have just been written."""
    heads, kv_heads, _ = options.shape[0]
    for tokens in [options.victims[0][0], *options.tokens]:
        for units in (1, kv_heads):
            sets = [_observed(heads, units, tokens, run.device) for _ in range(4)]
            moved = heads * (sets[0][0].itemsize * tokens + 4) + units * tokens // 8
            contenders = plain_contenders(
                "attention_hits", sets[0], moved, {"torch": _torch_hits}, run, written=(3,)
            )
            shape = f"B=1 Hq={heads} U={units} n={tokens}"
            yield measure("attention_hits", shape, dtype_name(sets[0][0]), sets, contenders, run)


def _observed(heads: int, units: int, tokens: int, device: str) -> tuple:
    logits = random_logits(heads, tokens, device)
    lens = torch.full((1,), tokens, dtype=torch.int32, device=device)
    hits = torch.empty(1, units, -(-tokens // 32), dtype=torch.int32, device=device)
    return logits, logits.float().logsumexp(-1), lens, hits, math.log(ALPHA)


def _torch_hits(x: tuple) -> None:
    logits, lse, _, hits, log_threshold = x
    hit = (logits - lse[..., None]).exp() >= math.exp(log_threshold)
    hit = hit.unflatten(1, (hits.shape[1], -1)).any(2)
    hit = torch.nn.functional.pad(hit, (0, hits.shape[2] * 32 - hit.shape[2]))
    bits = (hit.unflatten(-1, (-1, 32)).long() << torch.arange(32, device=hit.device)).sum(-1)
    hits.copy_(bits - ((bits >> 31) << 32))


# --- rotate_keys ----------------------------------------------------------------------------------


def bench_rotate_keys(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold. Rotated again and again, keys keep their size."""
    run = replace(run, probe=copy_probe(run.device, run.probe.bytes))
    _, heads, dim = options.shape[0]
    for tokens in options.tokens:
        for dtype in options.dtype:
            moved = 2 * heads * tokens * dim * DTYPES[dtype].itemsize
            sets = [
                _keys(heads, tokens, dim, DTYPES[dtype], run.device)
                for _ in range(run.num_sets(moved // 2))
            ]
            contenders = plain_contenders(
                "rotate_keys", sets[0], moved, {"rotate-half": _rotate_half}, run, written=(0,)
            )
            shape = f"B=1 H={heads}x{dim} n={tokens}"
            yield measure("rotate_keys", shape, dtype, sets, contenders, run)


def _keys(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> tuple:
    k = torch.randn(1, heads, tokens, dim, device=device).to(dtype)
    frequency = 1e4 ** (-torch.arange(0, dim, 2, device=device).double() / dim)
    angle = -1000 * frequency[None]
    return k, angle.cos().float(), angle.sin().float()


def _rotate_half(x: tuple) -> None:
    """As Hugging Face models do it, and back into the cache."""
    k, *tables = x
    cos, sin = (torch.cat([t, t], -1)[:, None, None].to(k.dtype) for t in tables)
    half = k.shape[-1] // 2
    turned = torch.cat([-k[..., half:], k[..., :half]], -1)
    k.copy_(k * cos + turned * sin)
