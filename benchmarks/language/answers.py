"""Questions inside real text: which answers survive a method, of those that dense attention gives.

The text around the facts and the question goes through decode steps behind the same prompt as in
`loss`, so that a method has to keep or find what is asked for.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from accuracy.intervals import wilson
from harness.record import meta
from harness.store import Row, Store
from kvcomp import Method
from language.lineup import Lineup, measured, together
from language.loss import PROMPT_SHARE
from language.questions import Question, Writer, kinds
from language.settings import settings

KEY = ("method", "bound")
DENSE = "dense"  # the row that says what the model answers by itself


class Answers:
    """Cells: a contender at a bound, on all questions that dense attention answers.

    Raises:
        ValueError: a bad option, or a file with other settings.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Namespace) -> None:
        self.model, self.options = model, options
        self.prompt = options.tokens // PROMPT_SHARE
        self.lineup = Lineup(model, options, options.tokens, self.prompt)
        writer = Writer(tokenizer)
        self.questions = [
            writer.write(kind, place, options.questions, options.tokens)
            for kind in options.kinds or kinds(options.tokens)
            for place in range(options.questions)
        ]
        asked = {"questions": options.questions, "kinds": options.kinds}
        common = settings(model, options, self.prompt, **asked)
        facts = meta(
            "language-answers", model.device.type, context_bytes=self.lineup.room.context_bytes
        )
        self.store = Store(options.json, KEY, common, facts)

    def run(self, bar: Callable[[str, int], Callable[[], None]]) -> Iterator[Row]:
        """What dense attention answers, then the cells that are not there yet."""
        solved = self._dense(bar)
        known = zip(self.questions, solved, strict=True)
        chosen = [question for question, right in known if right or self.options.smoke]
        if not chosen:
            raise ValueError(
                "kvcomp.language: dense attention answers none of the questions; ask in fewer"
                " --tokens"
            )
        ready: list[tuple[Row, Method]] = []
        for _, row, method in self.lineup.left(self.store):
            if method is None:
                self.store.add(row)
                yield row
            else:
                ready.append((row, method))
        for begin in range(0, len(ready), self.options.stack):
            yield from self._ask(ready[begin : begin + self.options.stack], chosen, bar)

    def _dense(self, bar: Callable[[str, int], Callable[[], None]]) -> list[bool]:
        """Of every question, whether dense attention answers it: a forward pass each, once."""
        known = [row for row in self.store.rows if row["method"] == DENSE]
        if known:
            return known[0]["solved"]
        tick, solved = bar("dense", len(self.questions)), []
        for question in self.questions:
            ids = torch.tensor([question.ids], device=self.model.device)
            with torch.no_grad():
                hidden = self.model.get_decoder()(ids, use_cache=False).last_hidden_state
            solved += self._right(hidden[:, :-1], [question])
            tick()
        row = {"method": DENSE, "bound": "1", "kinds": tally(self.questions, solved)}
        self.store.add(row | {"solved": solved})
        return solved

    def _ask(
        self,
        pairs: list[tuple[Row, Method]],
        questions: list[Question],
        bar: Callable[[str, int], Callable[[], None]],
    ) -> Iterator[Row]:
        ids = torch.tensor([q.ids for q in questions], device=self.model.device)
        what = ", ".join(f"{row['method']} {row['bound']}" for row, _ in pairs)
        tick = bar(what, ids.shape[1] - self.prompt - 1)
        results = together(self.model, pairs, ids, self.prompt, tick)
        for (row, _), (hidden, report) in zip(pairs, results, strict=True):
            right = self._right(hidden, questions)
            row = {**row, **measured(report, len(ids)), "kinds": tally(questions, right)}
            row["solved"] = right
            self.store.add(row)
            yield row

    def _right(self, hidden: Tensor, questions: list[Question]) -> list[bool]:
        """Whether the model's best tokens are the answer: hidden [questions, steps, width], whose
        last step predicts the last token."""
        found = []
        head = self.model.get_output_embeddings().weight
        for states, question in zip(hidden, questions, strict=True):
            best = torch.nn.functional.linear(states[-question.answer :], head).argmax(-1)
            found.append(tuple(best.tolist()) == question.ids[-question.answer :])
        return found


def tally(questions: list[Question], right: list[bool]) -> dict[str, list[int]]:
    """By kind: [answered, asked]."""
    counts: dict[str, list[int]] = {}
    for question, good in zip(questions, right, strict=True):
        count = counts.setdefault(question.kind, [0, 0])
        count[0] += good
        count[1] += 1
    return counts


def line(row: Row, context_bytes: int) -> str:
    head = f"{row['method']:34} {row['bound']:4}"
    if "reason" in row:
        return f"{head} {row['reason']}"
    right, asked = map(sum, zip(*row["kinds"].values(), strict=True))
    low, high = wilson(right, asked)
    kinds = "  ".join(f"{kind} {good}/{of}" for kind, (good, of) in row["kinds"].items())
    held = f"  held {row['peak_bytes'] / context_bytes:.1%}" if "peak_bytes" in row else ""
    return f"{head} {right / asked:4.0%} [{low:.0%}, {high:.0%}]  {kinds}{held}"
