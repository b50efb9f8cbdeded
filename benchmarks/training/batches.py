"""Problems of the reasoner's task by the batch, with what each token of an answer asks for."""

from __future__ import annotations

import numpy as np

from kvcomp.reasoner import task
from training.curriculum import DRILL, Stage

# What a supervised token asks for; NONE carries no loss.
NONE, SOURCE, TARGET_FIRST, TARGET_AGAIN, WEIGHT_FIRST, WEIGHT_AGAIN, SUM = range(7)
KINDS = ("source", "target 1st", "target again", "weight 1st", "weight again", "sum")


def make_batch(rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, ...]:
    """Draw problems of equal size: ``ids``, ``positions`` and ``kinds``, each ``[B, T]`` int64.

    A jump goes to a random fact instead of the one that the walk asks for. Its source cannot be
    foreseen and carries no loss; it makes first visits plentiful and teaches to go on from
    anywhere. A gap in the positions at a jump makes the sum before it unreachable for the heads
    that count positions, so that sum carries no loss either.
    """
    nodes = int(rng.integers(stage.nodes[0], stage.nodes[1] + 1))
    walk = int(rng.integers(stage.walk[0], stage.walk[1] + 1))
    facts, prompt = 2 * nodes, 1 + 3 * 2 * nodes + 4  # bos, facts, "from x sum 0"
    batch = max(1, stage.tokens // (prompt + task.TOKENS_PER_STEP * walk))
    rows = np.arange(batch)
    first = {
        kind: task.TOKEN_ID[word]
        for kind, word in {"digit": "0", "target": task.NAMES[0], "source": task.SOURCES[0]}.items()
    }

    target, weight, live = task.random_graphs(rng, batch, nodes)
    target, weight = target.reshape(batch, facts), weight.reshape(batch, facts)
    name = _shuffles(rng, batch, len(task.NAMES))  # node -> name
    if stage.jump == DRILL:  # targets need not be nodes: fewer lucky guesses
        goal = rng.integers(0, len(task.NAMES), (batch, facts))
    else:
        goal = np.take_along_axis(name, target, 1)
    source = 2 * np.repeat(name[:, :nodes], 2, axis=1) + np.tile([0, 1], nodes)
    fact = np.stack([first["source"] + source, first["target"] + goal, first["digit"] + weight], 2)
    listed = np.take_along_axis(fact, _shuffles(rng, batch, facts)[:, :, None], 1)

    node, total = rng.integers(0, live, batch), rng.integers(0, 10, batch)
    start = np.empty((batch, 4), dtype=np.int64)
    start[:, 0], start[:, 2] = task.TOKEN_ID["from"], task.TOKEN_ID["sum"]
    start[:, 1], start[:, 3] = first["target"] + name[rows, node], first["digit"] + total

    jump = rng.random((batch, walk)) < rng.uniform(*stage.jump, batch)[:, None]
    far = jump & (rng.random((batch, walk)) < 2 / walk)
    gap = np.where(far, rng.integers(0, stage.gap + 1, (batch, walk)) // 2, 0)
    deck = _shuffles(rng, batch, facts)
    seen = np.zeros((batch, facts), dtype=bool)
    steps = np.empty((batch, walk, task.TOKENS_PER_STEP), dtype=np.int64)
    kinds = np.empty_like(steps)
    for t in range(walk):
        at = np.where(jump[:, t], deck[:, t % facts], 2 * node + task.is_high(total))
        again = seen[rows, at]
        seen[rows, at] = True
        node, total = target[rows, at], (total + weight[rows, at]) % 10
        steps[:, t, :3], steps[:, t, 3] = fact[rows, at], first["digit"] + total
        kinds[:, t, 0] = np.where(jump[:, t], NONE, SOURCE)
        kinds[:, t, 1] = TARGET_FIRST + again
        kinds[:, t, 2] = WEIGHT_FIRST + again
        kinds[:, t, 3] = np.where(gap[:, t] > 0, NONE, SUM)

    bos = np.full((batch, 1), task.TOKEN_ID["<bos>"])
    flat = [bos, listed.reshape(batch, -1), start, steps.reshape(batch, -1)]
    ids = np.concatenate(flat, 1)
    stride = np.ones_like(ids)
    stride[:, prompt - 4] += rng.integers(0, stage.gap + 1, batch)
    stride[:, prompt :: task.TOKENS_PER_STEP] += gap
    all_kinds = np.full_like(ids, NONE)
    all_kinds[:, prompt:] = kinds.reshape(batch, -1)
    return ids, stride.cumsum(1) - 1, all_kinds


def _shuffles(rng: np.random.Generator, batch: int, n: int) -> np.ndarray:
    """``batch`` random permutations of ``range(n)``: ``[batch, n]``."""
    return rng.random((batch, n)).argsort(axis=1)
