"""A trace made by hand, whose queries stay with two topics for a while and then turn."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp import ops

WARM_UP = 16  # steps that are not counted: the first selection brings everything


@dataclass(frozen=True)
class Trace:
    """A prompt and steps, batch 1."""

    keys: Tensor  # [1, Hkv, prompt + steps, D]
    values: Tensor
    queries: Tensor  # [steps, 1, Hq, D]
    prompt: int

    def rate(self, tau: float) -> float:
        """The share of the steps whose queries have turned below tau, by LouisKV's rule."""
        previous = torch.zeros_like(self.queries[0])
        seen = [ops.query_similarity(q, previous).item() for q in self.queries]
        return sum(similarity < tau for similarity in seen[1:]) / (len(seen) - 1)


def make_trace(options: argparse.Namespace, dtype: torch.dtype) -> Trace:
    """Two topics together have as many tokens as the budget, and nearly all of the attention."""
    heads, kv_heads, dim = options.shape
    prompt, steps = options.prompt, options.steps + WARM_UP
    topics = max(4, 2 * prompt // options.budget)
    generator = torch.Generator().manual_seed(options.seed)
    choice = random.Random(options.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions, meanings = normal(kv_heads, topics, dim), normal(kv_heads, topics, dim)
    directions *= dim**0.5 / directions.norm(dim=-1, keepdim=True)
    run = (torch.rand(prompt, generator=generator) < 1 / 8).cumsum(0)  # of eight tokens on average
    topic = torch.randint(topics, (prompt + 1,), generator=generator)[run].tolist()
    pair, left, queries = choice.sample(range(topics), 2), 0, []
    for _ in range(steps):
        if left == 0:
            pair = [pair[1], choice.choice([t for t in range(topics) if t not in pair])]
            left = choice.randint(7, 13)
        left -= 1
        between = directions[:, pair].sum(1).repeat_interleave(heads // kv_heads, 0) / 2**0.5
        queries.append(between + normal(heads, dim) / 3)  # cosines of 0.9, and 0.45 at a turn
        topic.append(choice.choice(pair))
    chosen = torch.tensor(topic)
    keys = directions[:, chosen] + normal(kv_heads, prompt + steps, dim)
    values = meanings[:, chosen] + normal(kv_heads, prompt + steps, dim)
    parts = (keys[None], values[None], torch.stack(queries)[:, None])
    return Trace(*(x.to(options.device, dtype) for x in parts), prompt)
