"""page_scores and select_pages."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from kvcomp.testing.bench import Row
from kvcomp.testing.contest import Settings, measure
from ops.common import PAGE, PEAK, plain_contenders

RECENT = 8  # pages, DELTA's default


def bench_page_scores(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: attention has read K and V since it wrote most of the logits."""
    for tokens in options.tokens:
        heads = options.shape[0][0]
        moved = 4 * heads * (tokens + 1) + 4 * tokens // PAGE
        sets = [_scored(heads, tokens, run.device) for _ in range(run.num_sets(moved))]
        contenders = plain_contenders(
            "page_scores", sets[0], moved, {"torch-exp-amax": _torch_page_scores}, run
        )
        shape = f"B=1 Hq={heads} n={tokens} page={PAGE}"
        yield measure("page_scores", shape, "fp32", sets, contenders, run)


def _scored(heads: int, tokens: int, device: str) -> tuple:
    logits = torch.randn(1, heads, tokens, device=device) * PEAK
    lens = torch.full((1,), tokens, dtype=torch.int32, device=device)
    return logits, logits.logsumexp(-1), lens, PAGE, 1, True


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
