"""page_scores, select_pages, and both with the attention before them: attend_and_select."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.ops.attend_and_select import in_turn
from ops.common import (
    DTYPES,
    PAGE,
    PEAK,
    calling,
    dtype_name,
    empty_logits,
    plain_contenders,
    random_logits,
)

RECENT = 8  # pages, DELTA's default


def bench_page_scores(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: attention has read K and V since it wrote most of the logits."""
    for tokens in options.tokens:
        heads = options.shape[0][0]
        size = random_logits(heads, 1, run.device).itemsize
        moved = heads * (size * tokens + 4) + 4 * tokens // PAGE
        sets = [_scored(heads, tokens, run.device) for _ in range(run.num_sets(moved))]
        contenders = plain_contenders(
            "page_scores", sets[0], moved, {"torch-exp-amax": _torch_page_scores}, run
        )
        shape = f"B=1 Hq={heads} n={tokens} page={PAGE}"
        yield measure("page_scores", shape, dtype_name(sets[0][0]), sets, contenders, run)


def _scored(heads: int, tokens: int, device: str) -> tuple:
    logits = random_logits(heads, tokens, device)
    lens = torch.full((1,), tokens, dtype=torch.int32, device=device)
    return logits, logits.float().logsumexp(-1), lens, PAGE, 1, True


def _torch_page_scores(x: tuple) -> Tensor:
    logits, lse = x[:2]
    return (logits - lse[..., None]).exp().amax(1, keepdim=True).unflatten(-1, (-1, PAGE)).sum(-1)


def bench_select_pages(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: the scores have just been computed. torch.topk forces no pages and sorts nothing."""
    for total, count in options.selections:
        page_size = PAGE if total // count >= PAGE else 1
        recent = min(RECENT, count)
        sets = [_candidates(total, count, page_size, recent, run.device) for _ in range(16)]
        moved = 4 * (total + count)
        baselines = {
            "topk": lambda x: x[0].topk(x[3], sorted=False).indices,
            "topk-sort": lambda x: x[0].topk(x[3], sorted=False).indices.int().sort(-1).values,
        }
        trust = tuple(baselines)
        contenders = plain_contenders("select_pages", sets[0], moved, baselines, run, trust=trust)
        shape = f"B=1 m={total} k={count}"
        yield measure("select_pages", shape, "fp32", sets, contenders, run)


def _candidates(total: int, count: int, page_size: int, recent: int, device: str) -> tuple:
    scores = (torch.randn(1, 1, total, device=device) * PEAK).exp()  # a few large, a long tail
    lens = torch.full((1,), total * page_size, dtype=torch.int32, device=device)
    return scores, lens, page_size, count, recent, 0


def bench_attend_and_select(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """One call, against the three ops that it stands for. Cold, as decode_attention."""
    heads, kv_heads, dim = options.shape[0]
    for tokens in options.tokens:
        for dtype in options.dtype:
            kv_bytes = 2 * kv_heads * tokens * dim * DTYPES[dtype].itemsize
            sets = [
                _attended(heads, kv_heads, dim, tokens, options.budget, DTYPES[dtype], run.device)
                for _ in range(run.num_sets(kv_bytes))
            ]
            moved = kv_bytes + 2 * sets[0][8].nbytes + 4 * tokens // PAGE
            shape = f"B=1 {heads}/{kv_heads}x{dim} n={tokens} page={PAGE}"
            contenders = list(_fused_and_in_turn(sets[0], moved, kv_bytes, run))
            yield measure("attend_and_select", shape, dtype, sets, contenders, run)


def _attended(
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    budget: int,
    dtype: torch.dtype,
    device: str,
) -> tuple:
    q = (torch.randn(1, heads, dim, device=device) * PEAK).to(dtype)
    k, v = (torch.randn(1, kv_heads, tokens, dim, dtype=dtype, device=device) for _ in "kv")
    lens = torch.full((1,), tokens, dtype=torch.int32, device=device)
    logits = empty_logits(q, tokens)
    count = max(1, min(budget, tokens) // PAGE)
    rest = 1, True, min(RECENT, count), 0
    return q, k, v, lens, None, PAGE, count, dim**-0.5, logits, *rest


def _fused_and_in_turn(
    args: tuple, moved: int, kv_bytes: int, run: Settings
) -> Iterator[Contender]:
    op = OPS["attend_and_select"]
    # Two pages of all but equal score may change places when rounded.
    expected = Expected(_chosen(op.reference), args, ids_may_differ=0.02)
    for name in implementations("attend_and_select", run.device, kv_bytes):
        parts = [OPS[x].impls[name] for x in ("decode_attention", "page_scores", "select_pages")]
        apart = Contender(name, calling(_chosen(in_turn(*parts))), moved, "in turn", expected)
        against = (Against("in-turn", apart.key),)
        yield apart
        call = calling(_chosen(op.impls[name]))
        yield Contender(name, call, moved, "", expected, against=against)


def _chosen(select: Callable) -> Callable:
    """Without the scores, which are those of logits as they are kept, not as they were."""

    def run(*args: object) -> tuple[Tensor, ...]:
        out, lse, _, page_ids, selected_lens = select(*args)
        return out, lse, page_ids, selected_lens

    return run
