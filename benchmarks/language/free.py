"""Free running: how long a method writes the same words as dense attention, and does it loop?"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from accuracy.intervals import bootstrap
from harness.record import meta
from harness.store import Row, Store
from kvcomp import Full, Method, patch
from kvcomp.cache import Report
from kvcomp.reading import windows
from language.lineup import Lineup, kinds_of, measured, options
from language.loss import PROMPT_SHARE
from language.rounding import rounding
from language.settings import places, settings
from language.stack import Stack, stackable

KEY = ("method", "bound")
GRAM = 8  # tokens: a run of so many that came before is a repetition


class FreeRunning:
    """Cells: a contender at a bound, on all prompts. Dense attention writes first.

    Raises:
        ValueError: a bad option, or a file with other settings.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Namespace) -> None:
        self.model, self.options = model, options
        prompt = options.tokens // PROMPT_SHARE
        self.count = options.tokens - prompt
        self.lineup = Lineup(model, options, options.tokens, prompt)
        chosen = windows(tokenizer, options.windows, prompt)
        self.prompts = torch.tensor([window.ids for window in chosen], device=model.device)
        common = settings(model, options, prompt, prompts=places(chosen))
        facts = meta(
            "language-free", model.device.type, context_bytes=self.lineup.room.context_bytes
        )
        self.store = Store(options.json, KEY, common, facts)

    def run(self, bar: Callable[[str, int], Callable[[], None]]) -> Iterator[Row]:
        """The cells that are not there yet."""
        dense = self._dense(bar)
        ready: list[tuple[Row, Method]] = []
        for _, row, method in self.lineup.left(self.store):
            if method is None:
                self.store.add(row)
                yield row
            else:
                ready.append((row, method))
        for begin in range(0, len(ready), self.options.stack):
            pairs = ready[begin : begin + self.options.stack]
            what = ", ".join(f"{row['method']} {row['bound']}" for row, _ in pairs)
            tick = bar(what, self.count - 1)
            results = written(self.model, pairs, self.prompts, self.count, tick)
            for (row, _), (ids, report) in zip(pairs, results, strict=True):
                row = {**row, **measured(report, len(ids)), **figures(ids, dense)}
                self.store.add(row)
                yield row

    def _dense(self, bar: Callable[[str, int], Callable[[], None]]) -> Tensor:
        """What dense attention writes, [prompts, count]; kept with the results."""
        known = [row for row in self.store.rows if row["method"] == "full"]
        if known:
            return torch.tensor(known[0]["ids"], device=self.model.device)
        tick = bar("full", self.count - 1)
        row: Row = {"method": "full", "bound": "1", "baseline": True}
        [(ids, report)] = written(self.model, [(row, Full())], self.prompts, self.count, tick)
        self.store.add(
            {**row, "ids": ids.tolist(), **measured(report, len(ids)), **figures(ids, ids)}
        )
        return ids


@torch.no_grad()
def written(
    model: Any,
    pairs: list[tuple[Row, Method]],
    prompts: Tensor,
    count: int,
    tick: Callable[[], None],
) -> list[tuple[Tensor, Report]]:
    """Greedy ids [B, count] of every method behind prompts [B, tokens], and its report."""
    methods, kinds = [method for _, method in pairs], kinds_of(pairs)
    if stackable(model):
        stack = Stack(model, methods, kinds)
        return list(zip(stack.write(prompts, count, tick), stack.reports(), strict=True))
    found = []
    for method, kind in zip(methods, kinds, strict=True):
        with rounding(kind), patch(model, method, **options(kind)) as run:
            cache, tokens, ids = run.new_cache(), prompts, []
            for _ in range(count):
                out = model(tokens, past_key_values=cache, logits_to_keep=1)
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
                ids.append(tokens)
                tick()
            found.append((torch.cat(ids, 1), run.report()))
    return found


def figures(ids: Tensor, dense: Tensor) -> Row:
    """Of each prompt: `same`, tokens before the first that differs from dense attention's, and
    `repeated`, the share of runs of GRAM tokens that came before."""
    same = (ids == dense).int().cumprod(1).sum(1)
    return {"same": same.tolist(), "repeated": [repeated(row) for row in ids.tolist()]}


def repeated(ids: list[int]) -> float:
    grams = list(zip(*(ids[place:] for place in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def line(row: Row, context_bytes: int) -> str:
    head = f"{row['method']:34} {row['bound']:4}"
    if "reason" in row:
        return f"{head} {row['reason']}"
    low, high = bootstrap(row["same"])
    middle = sorted(row["same"])[len(row["same"]) // 2]
    again = sum(row["repeated"]) / len(row["repeated"])
    return (
        f"{head} as dense for {sum(row['same']) / len(row['same']):.0f} [{low:.0f}, {high:.0f}]"
        f" tokens, median {middle}  repeated {again:.0%}"
        f"  held {row['peak_bytes'] / context_bytes:.1%}  {len(row['same'])} prompts"
    )
