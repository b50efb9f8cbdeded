"""Parts `drafted` and `chunks` of bench_thinking.py: what Stand changes beside time."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import kvcomp
from kvcomp import thinking
from kvcomp.reasoner import task
from speculation import GREEDY, walk

SCHEDULE = {"chunk": 256, "carry": 128, "head": 32}
FIRST = 64  # tokens of a chunk


def decoded(model: Any, method: kvcomp.Method, ids: Tensor, new: int, stand: Any) -> Any:
    """New ids of a greedy run, with Stand or without, and its report."""
    own = {} if stand is None else {"custom_generate": stand}
    with kvcomp.patch(model, method) as run:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=model.config.vocab_size,  # none at all
            pad_token_id=0,
            max_new_tokens=new,
            **GREEDY,
            **own,
        )
        return out[0, ids.shape[1] :].tolist(), run.report()


def agreeing(tokens: list[int], others: list[int]) -> int:
    """Tokens up to the first that differs."""
    pairs = zip(tokens, others, strict=True)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(tokens))


def drafted(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each method with Stand and without, on one walk behind the first context."""
    context, new = options.contexts[0], options.new
    text = walk(tokenizer, options.walks[0], context + new)
    ids, gold = text[:, :context], text[0, context : context + new].tolist()
    cases = {
        "full": kvcomp.Full(),
        "delta query": kvcomp.Delta(budget=1024),
        "delta step": kvcomp.Delta(budget=1024, select="step"),
        "lazy-eviction": kvcomp.LazyEviction(budget=256, window=64),
        "louiskv": kvcomp.LouisKV(budget=512, audit=True),
    }
    found = []
    for name, method in cases.items():
        plain, before = decoded(model, method, ids, new, None)
        tokens, after = decoded(model, method, ids, new, thinking.Stand(adapt=False))
        forwards = after.tokens_decoded - after.tokens_accepted
        row = {"part": "drafted", "contender": name, "context": context, "new": new}
        row |= {"same_tokens": agreeing(plain, tokens)}
        row |= {"right_plain": agreeing(plain, gold), "right_stand": agreeing(tokens, gold)}
        row |= {"tokens_per_forward": after.tokens_decoded / forwards}
        row |= {"kv_bytes_plain": before.kv_bytes_peak, "kv_bytes_stand": after.kv_bytes_peak}
        if name.startswith("delta"):  # one of each draft, or one of each forward
            of_drafts = after.tokens_drafted + forwards
            selections = of_drafts if name == "delta query" else forwards
            row |= {"selections_per_token": selections / after.tokens_decoded}
        if before.recall_after is not None:
            row |= {"recall_plain": before.recall_after, "recall_stand": after.recall_after}
            row |= {"link_plain": before.link_bytes_per_token}
            row |= {"link_stand": after.link_bytes_per_token}
        found.append(row)
    return found


class Watched:
    """Counts the forwards of a Stand, and the tokens that they bring, at the beginning of chunks
    from the second on.

    Args:
        empties: whether the table is emptied where a chunk begins.
    """

    def __init__(self, method: kvcomp.Delethink, columns: int, empties: bool) -> None:
        self.stand = thinking.Stand(adapt=False)
        self.empties, self.columns = empties, columns
        self.starts = [0]
        while self.starts[-1] < 10_000:
            chunk = method.chunk_at(len(self.starts))
            assert chunk is not None
            self.starts.append(chunk.start)
        self.places: list[int] = []  # tokens before each forward
        self._draft = self.stand.drafter.draft
        self.stand.drafter.draft = self.draft  # type: ignore[method-assign]

    def draft(self, rows: Any, *given: Any) -> Any:
        place = rows[0][1] - self.columns
        new = {start for start in self.starts if self.places and self.places[-1] < start <= place}
        if self.empties and new:
            self.stand.table.clear()
        self.places.append(place)
        return self._draft(rows, *given)

    def tokens_per_forward(self) -> tuple[float, float]:
        """At the beginning of chunks, and elsewhere."""
        found = ([], [])
        for place, after in zip(self.places, self.places[1:], strict=False):
            start = max(each for each in self.starts if each <= place)
            found[not (start and place - start < FIRST)].append(after - place)
        first, others = (sum(each) / max(len(each), 1) for each in found)
        return first, others


def chunks(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Stand under Delethink on walks; the table that it keeps knows what the chunk does not."""
    method, found = kvcomp.Delethink(**SCHEDULE, max_chunks=None), []
    new = max(options.new, SCHEDULE["chunk"] + FIRST)
    for empties in (False, True):
        each = []
        for seed in options.walks:
            prompt = task.make_problem(16, 64, seed=seed).prompt
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            watched = Watched(method, ids.shape[1], empties)
            decoded(model, method, ids, new, watched.stand)
            each.append(watched.tokens_per_forward())
        first, others = (sum(values) / len(values) for values in zip(*each, strict=True))
        name = "emptied at each chunk" if empties else "kept"
        row = {"part": "chunks", "contender": name, "new": new, "walks": len(each)}
        found.append(row | {"first_tokens_per_forward": first, "other_tokens_per_forward": others})
    return found
