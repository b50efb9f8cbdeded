"""Methods calibrated on some windows of real text against their defaults, on other windows.

What `Method.calibrate` chooses from a few answers must never predict other text worse than the
default. Where it keeps the default there is nothing to compare.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from accuracy.intervals import bootstrap
from harness.record import meta
from harness.store import Row, Store
from kvcomp import METHODS, Delta, Method
from kvcomp.reading import Dense, windows
from language.lineup import Contender, Lineup, measured, together
from language.loss import PROMPT_SHARE
from language.settings import by_window, places, settings

KEY = ("method", "bound")
MEASURED = {"lazy-eviction": "alpha", "delta": "delta_layers"}  # all other fields are given
SHOWN = 2  # windows of `tokens` tokens to calibrate on, one of each text


class Calibrated:
    """Cells: a contender at a bound, calibrated and as it comes.

    The windows to calibrate on begin where the first windows of `loss` end.

    Raises:
        ValueError: a bad option, or a file with other settings.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Namespace) -> None:
        self.model, self.options = model, options
        self.prompt = options.tokens // PROMPT_SHARE
        names = [each for each in options.methods if Contender(each).name in MEASURED]
        if not names:
            raise ValueError(
                f"kvcomp.language: --methods: expected {' or '.join(MEASURED)}, got"
                f" {' '.join(options.methods)}"
            )
        if options.kv and options.kv != ["model"]:
            raise ValueError(
                f"kvcomp.language: --kv: expected model with this part, got {' '.join(options.kv)}"
            )
        chosen = Namespace(**{**vars(options), "methods": names})
        self.lineup = Lineup(model, chosen, options.tokens, self.prompt)
        self.windows = windows(tokenizer, options.windows, options.tokens)
        self.shown = windows(tokenizer, SHOWN, options.tokens, offset=options.tokens)
        both = {"windows": places(self.windows), "shown": places(self.shown)}
        common = settings(model, options, self.prompt, **both)
        facts = meta(
            "language-calibrated",
            model.device.type,
            context_bytes=self.lineup.room.context_bytes,
        )
        self.store = Store(options.json, KEY, common, facts)

    def run(self, bar: Callable[[str, int], Callable[[], None]]) -> Iterator[Row]:
        """The cells that are not there yet."""
        for each, row, default in self.lineup.left(self.store):
            if default is not None:
                row |= self._compare(each, default, bar)
            self.store.add(row)
            yield row

    def _compare(
        self, each: Contender, default: Method, bar: Callable[[str, int], Callable[[], None]]
    ) -> Row:
        given = {
            name: value for name, value in vars(default).items() if name != MEASURED[each.name]
        }
        prompts = [list(window.ids[: self.prompt]) for window in self.shown]
        answers = [list(window.ids[self.prompt :]) for window in self.shown]
        begin = time.perf_counter()
        found = METHODS[each.name].calibrate(self.model, prompts, answers=answers, **given)
        row: Row = {"seconds": time.perf_counter() - begin, "found": str(found)}
        if self._same(found, default):
            return row | {"kept": True}
        pairs: list[tuple[Row, Method]] = [
            ({"method": each.label}, method) for method in (default, found)
        ]
        dense = Dense(self.model, self.windows, self.prompt)
        tick = bar(each.label, dense.steps)
        (usual, _), (new, report) = together(self.model, pairs, dense.ids, self.prompt, tick)
        figures = zip(*dense.compare([usual, new], slice(None)), strict=True)
        compared = [{"default": before, "found": after} for before, after in figures]
        return row | {
            "kept": False,
            **measured(report, len(dense.ids)),
            "windows": by_window(self.windows, compared),
        }

    def _same(self, found: Method, default: Method) -> bool:
        if isinstance(found, Delta) and isinstance(default, Delta):  # given layers, or places
            layers = int(self.lineup.room.place.layers)
            default = replace(default, delta_layers=default.plan(layers))
            found = replace(found, delta_layers=found.plan(layers))
        return found == default


def gain(row: Row) -> tuple[float, tuple[float, float]]:
    """Loss of the default minus that of the calibrated method, with a 95 % interval."""
    gains = [each["default"]["nll"] - each["found"]["nll"] for each in row["windows"]]
    return sum(gains) / len(gains), bootstrap(gains)


def line(row: Row, context_bytes: int) -> str:
    head = f"{row['method']:34} {row['bound']:4}"
    if "reason" in row:
        return f"{head} {row['reason']}"
    took = f"{head} {row['seconds']:.0f} s"
    if row["kept"]:
        return f"{took}  the default stays"
    mean, (low, high) = gain(row)
    held = f"held {row['peak_bytes'] / context_bytes:.1%}"
    return f"{took}  gain {mean:+.4f} [{low:+.4f}, {high:+.4f}]  {held}  {row['found']}"
