"""append_attention, and a second turn over a layer of the cache, which is made of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp import Full
from kvcomp.cache import KVCache, LayerCache
from kvcomp.hf.attention import attend_many
from kvcomp.ops import OPS
from ops.attention import Shape
from ops.common import DTYPES, PEAK

COUNTS = 1, 4, 8, 16  # new tokens
TREE = 8  # of which one is checked as a tree


class Inputs(NamedTuple):
    q: Tensor  # [B, m, Hq, D], the most of COUNTS
    k: Tensor
    v: Tensor
    lens: Tensor  # all of n


def input_sets(shape: Shape, run: Settings) -> list[Inputs]:
    """Cold sets, copies of one K and V."""
    generator = torch.Generator(run.device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=run.device)
    kv_shape = shape.batch, shape.kv_heads, shape.tokens, shape.dim
    k, v = random(kv_shape, dtype=shape.dtype), random(kv_shape, dtype=shape.dtype)
    lens = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=run.device)
    q = random(shape.batch, max(COUNTS), shape.heads, shape.dim) * PEAK
    sets = run.num_sets(shape.kv_bytes(shape.batch * shape.tokens))
    return [Inputs(q.to(shape.dtype), k.clone(), v.clone(), lens) for _ in range(sets)]


def append(call: Callable, shape: Shape, count: int, tail: Tensor | None, x: Inputs) -> tuple:
    return call(x.q[:, :count], x.k, x.v, x.lens, None, tail, None, 1, shape.scale, None)


def expect(shape: Shape, count: int, tail: Tensor | None, x: Inputs) -> Expected:
    def right(*fields: Tensor) -> tuple:
        return append(OPS["append_attention"].reference, shape, count, tail, Inputs(*fields))

    return Expected(right, x)


def one_by_one(shape: Shape, device: str, count: int, x: Inputs) -> Tensor:
    """A plain decode step for each of the tokens."""
    decode = OPS["decode_attention"].impls[OPS["decode_attention"].bound[device]]
    given = x.k, x.v
    return torch.stack(
        [
            decode(x.q[:, i], *given, x.lens - (count - 1 - i), None, 1, shape.scale, None)[0]
            for i in range(count)
        ],
        1,
    )


def concatenated(shape: Shape, count: int, x: Inputs) -> Tensor:
    """What a cache that hands out what it holds leads to: a copy with the new tokens behind, a
    mask, and SDPA."""
    past = shape.tokens - count
    k, v = (torch.cat([part[:, :, :past], part[:, :, past:]], 2) for part in (x.k, x.v))
    seen = torch.ones(count, shape.tokens, dtype=torch.bool, device=k.device).tril(past)
    seen = seen.expand(shape.batch, 1, -1, -1)
    q = x.q[:, :count].transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, seen, scale=shape.scale, enable_gqa=True)
    return out.transpose(1, 2)


def comb(shape: Shape, device: str) -> Tensor:
    """Drafts in two branches: each sees the root and every other draft before it."""
    rows = [1 | sum(1 << j for j in range(i, 0, -2)) for i in range(TREE)]
    return torch.tensor(rows, device=device).expand(shape.batch, -1)


def bench_append_attention(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    for heads, kv_heads, dim in options.shape:
        for tokens in options.tokens:
            for dtype in options.dtype:
                shape = Shape(options.batch[0], heads, kv_heads, dim, tokens, DTYPES[dtype])
                sets = input_sets(shape, run)
                contenders = list(append_contenders(shape, sets[0], run.device))
                yield measure("append_attention", str(shape), dtype, sets, contenders, run)


def append_contenders(shape: Shape, x: Inputs, device: str) -> Iterator[Contender]:
    """For each m: m plain steps, a copy and SDPA, the op; and the op against its own m = 1."""
    moved = shape.kv_bytes(shape.batch * shape.tokens)
    expected, masks = {}, {str(count): (count, None) for count in COUNTS}
    masks[f"{TREE} tree"] = TREE, comb(shape, device)
    for name, (count, tail) in masks.items():
        expected[name] = expect(shape, count, tail, x)
    for count in COUNTS:
        for impl, call in {
            "one-by-one": partial(one_by_one, shape, device, count),
            "cat-sdpa": partial(concatenated, shape, count),
        }.items():
            yield Contender(impl, call, moved, f"m={count}", expected[str(count)], ours=False)
    for impl in implementations("append_attention", device, moved):
        for name, (count, tail) in masks.items():
            call = partial(append, OPS["append_attention"].impls[impl], shape, count, tail)
            others = "one-by-one", "cat-sdpa"
            against = [Against(other, f"{other} m={count}") for other in others]
            against.append(Against("own-one", f"{impl} m=1", 1.0))
            if tail is not None:
                against = [Against("own-chain", f"{impl} m={count}", 1.0)]
            if impl == "reference":
                against = []
            variant = f"m={name}"
            yield Contender(impl, call, moved, variant, expected[name], against=tuple(against))


# --- a second turn over a layer -------------------------------------------------------------------


class Turn(NamedTuple):
    cache: KVCache
    layer: LayerCache
    inputs: Inputs


def turn_sets(shape: Shape, run: Settings) -> list[Turn]:
    turns = []
    for x in input_sets(shape, run):
        cache = KVCache(Full(), 1)
        cache.layers[0].append(x.k, x.v)
        turns.append(Turn(cache, cache.layers[0], x))
    return turns


def second_turn(shape: Shape, count: int, x: Turn) -> Tensor:
    return attend_many(x.layer, x.inputs.q[:, :count].transpose(1, 2), None, shape.scale)


def bench_second_turn(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    for heads, kv_heads, dim in options.shape:
        for tokens in options.tokens:
            for dtype in options.dtype:
                shape = Shape(options.batch[0], heads, kv_heads, dim, tokens, DTYPES[dtype])
                sets = turn_sets(shape, run)
                contenders = list(turn_contenders(shape, sets[0]))
                yield measure("second_turn", str(shape), dtype, sets, contenders, run)


def turn_contenders(shape: Shape, x: Turn) -> Iterator[Contender]:
    """`attend_many` as models call it, against what it was before."""
    moved = shape.kv_bytes(shape.batch * shape.tokens)
    for count in COUNTS:
        expected = expect(shape, count, None, x.inputs)
        variant = f"m={count}"

        def copying(x: Turn, count: int = count) -> Tensor:
            return concatenated(shape, count, x.inputs)

        yield Contender("cat-sdpa", copying, moved, variant, expected, ours=False)
        against = (Against("cat-sdpa", f"cat-sdpa {variant}"),)
        call = partial(second_turn, shape, count)
        yield Contender("attend-many", call, moved, variant, expected, against=against)
