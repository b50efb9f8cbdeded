"""The study: every method at every bound, cell by cell.

A cell is one batch of problems under one method at one bound. Its row is written as soon as it is
there, so that a run that was interrupted goes on with the next one.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accuracy.plans import EqualBytes, Plan, Published, own_fields
from accuracy.sizes import keeps_all
from accuracy.summary import Summary, summarize
from accuracy.workload import Workload
from evaluation.published import PRESETS
from harness.kv import labels, parted
from harness.record import meta
from harness.store import Row, Store, stored

BENCHMARK = "accuracy-study"
ROUNDING = 1.01  # rows of a batch are of different lengths, and an index grows in steps


class Cell(NamedTuple):
    """One batch of problems under one method at one bound."""

    method: str
    bound: str
    seed: int
    batch: int


class Study:
    """All cells of the command line, and what becomes of each.

    Raises:
        ValueError: a bad option, or the file is of a study with other settings.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.work = Workload(options)
        room = self.room = self.work.room
        self.plan: Plan
        settings = self.work.settings() | {"preset": options.preset}
        if options.preset is None:
            own = own_fields(options.set, options.methods)
            self.plan = EqualBytes(options.methods, options.budgets, own, room, options.equal)
            if options.equal == "bytes":
                settings["equal"] = "bytes"
            settings["alpha"] = self._alpha(self.plan)
            for name in {"lazy-eviction", "raas"} if settings["alpha"] is not None else ():
                own[name] = {"alpha": settings["alpha"], **own.get(name, {})}
        else:
            self.plan = Published(PRESETS[options.preset], room)
        facts = meta(
            BENCHMARK,
            self.work.device.type,
            context=int(room.place.seen) + 1,
            prompt=room.place.prompt,
            context_bytes=room.context_bytes,
            token_bytes=room.token_bytes,
        )
        self.store = Store(options.json, Cell._fields, settings, facts)

    def cells(self) -> list[Cell]:
        """Seed by seed, so that what is there early is of all methods and bounds."""
        return [
            Cell(label, bound, seed, batch)
            for seed in self.options.seeds
            for name, bound in self.plan.pairs()
            for label in labels([name], self.options.kv)
            for batch in range(len(self.work.batches(seed)))
        ]

    def run(self) -> None:
        """The cells that are not done, as many as the options allow."""
        cells, done = self.cells(), self.store.done()
        left = [cell for cell in cells if cell not in done]
        before, step = len(cells) - len(left), 1 / self.work.new_tokens
        with _bar() as bar:
            total = bar.add_task("", total=len(cells), completed=before)
            for count, cell in enumerate(left[: self.options.cells], before + 1):
                bar.update(total, description=f"{cell.method} {cell.bound}")
                row = self.row(cell, lambda: bar.advance(total, step))
                self.store.add(row)
                bar.update(total, completed=count)
                print(summarize([row])[0].line(self.room.context_bytes), flush=True)

    def row(self, cell: Cell, tick: Callable[[], None]) -> Row:
        name, kv = parted(cell.method)
        bound = self.plan.bound_bytes(cell.bound)
        problems = self.work.batches(cell.seed)[cell.batch]
        row: Row = {
            **cell._asdict(),
            "baseline": self.plan.is_baseline(name),
            "published": self.plan.published(name),
            "bound_bytes": bound,
            "problems": [problem.id for problem in problems],
            "prompts": [len(ids) for ids in self.work.encode(problems)],
            "parameters": None,
            "reason": None,
        }
        try:
            method = self.plan.method(name, kv, cell.bound, self.store.rows)
            row["parameters"] = str(method)
            grades, generated, report, trace = self.work.decode(
                method, kv, problems, cell.seed, tick
            )
        except (ValueError, torch.OutOfMemoryError) as error:
            return row | {"reason": str(error).partition("\n")[0]}
        count = len(problems)
        peak = (report.kv_bytes_peak + report.tracking_bytes_peak) // count
        free = keeps_all(method)
        return row | {
            "right": [grade.correct for grade in grades],
            "steps": [grade.steps for grade in grades],
            "first_visits": [grade.first_visit for grade in grades],
            "generated": generated,
            "keeps_all": free,
            "over": bound is not None and not free and peak > ROUNDING * bound,
            "peak_bytes": peak,
            "tracking_bytes": report.tracking_bytes_peak // count,
            "host_bytes": report.host_bytes_peak // count,
            "attended_tokens": report.tokens_attended,
            "attended": report.attended_ratio,
            "read_bytes": report.kv_bytes_read_per_token,
            "link_bytes": report.link_bytes_per_token,
            "seconds": report.decode_seconds,
            "trace": trace if (cell.seed, cell.batch) == (self.options.seeds[0], 0) else [],
        }

    def summaries(self) -> list[Summary]:
        """Of all cells so far, method by method."""
        order = {name: place for place, (name, _) in enumerate(self.plan.pairs())}
        found = summarize(self.store.rows)
        return sorted(found, key=lambda each: order.get(parted(each.method)[0], len(order)))

    def _alpha(self, plan: EqualBytes) -> float | None:
        """As given, or as the file has it, or calibrated at the middle bound on walks that are not
        graded; None: what was published for the model. One for all bounds."""
        if self.options.alpha is not None:
            return self.options.alpha
        before = stored(self.options.json, BENCHMARK)
        if before is not None:
            return before["meta"]["settings"].get("alpha")
        if not (self.work.walks and {"lazy-eviction", "raas"} & set(plan.methods)):
            return None
        bounds = sorted(plan.bounds.values())
        return self.work.calibrated(bounds[len(bounds) // 2])


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
