"""Loss on real text: every method at equal bytes, teacher-forced through decode steps."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from accuracy.intervals import bootstrap
from harness.record import meta
from harness.store import Row, Store
from kvcomp import Method
from kvcomp.reading import Dense, windows
from language.lineup import Contender, Lineup, measured, together
from language.settings import by_window, places, settings

PROMPT_SHARE = 8  # of a window: so that a quarter of its bytes can hold the prompt, and more
KEY = ("method", "bound", "first")


class LossStudy:
    """Cells: a contender at a bound on a batch of windows.

    Raises:
        ValueError: a bad option, or a file with other settings.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Namespace) -> None:
        self.model, self.options = model, options
        self.prompt = options.tokens // PROMPT_SHARE
        self.lineup = Lineup(model, options, options.tokens, self.prompt)
        self.windows = windows(tokenizer, options.windows, options.tokens)
        common = settings(model, options, self.prompt, windows=places(self.windows))
        facts = meta(
            "language-loss",
            model.device.type,
            context_bytes=self.lineup.room.context_bytes,
            token_bytes=self.lineup.room.token_bytes,
        )
        self.store = Store(options.json, KEY, common, facts)

    def cells(self) -> list[tuple[Contender, str, int]]:
        batches = range(0, len(self.windows), self.options.batch)
        return [(*cell, first) for first in batches for cell in self.lineup.cells()]

    def run(self, bar: Callable[[str, int], Callable[[], None]]) -> Iterator[Row]:
        """The cells that are not there yet, each written as soon as it is done."""
        done = self.store.done()
        left = [cell for cell in self.cells() if (cell[0].label, *cell[1:]) not in done]
        ready: list[tuple[Row, Method]] = []
        for each, bound, first in left:
            row, method = self.lineup.begin(each, bound)
            row["first"] = first
            if method is None:
                self.store.add(row)
                yield row
            else:
                ready.append((row, method))
        if not ready:
            return
        dense = Dense(self.model, self.windows, self.prompt)
        for first in sorted({row["first"] for row, _ in ready}):
            here = [pair for pair in ready if pair[0]["first"] == first]
            for begin in range(0, len(here), self.options.stack):
                pairs = here[begin : begin + self.options.stack]
                yield from self._read(pairs, first, dense, bar)

    def _read(
        self,
        pairs: list[tuple[Row, Method]],
        first: int,
        dense: Dense,
        bar: Callable[[str, int], Callable[[], None]],
    ) -> Iterator[Row]:
        rows = slice(first, first + self.options.batch)
        ids = dense.ids[rows]
        what = ", ".join(f"{row['method']} {row['bound']}" for row, _ in pairs)
        results = together(self.model, pairs, ids, self.prompt, bar(what, dense.steps))
        figures = dense.compare([hidden for hidden, _ in results], rows)
        for (row, _), (_, report), found in zip(pairs, results, figures, strict=True):
            row = row | {
                **measured(report, len(ids)),
                "windows": by_window(self.windows[rows], found),
            }
            self.store.add(row)
            yield row


def summaries(rows: list[Row]) -> list[Row]:
    """One line a method and bound: means over all windows, with 95 % intervals over them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["bound"]), []).append(row)
    found = []
    for (method, bound), group in groups.items():
        line: Row = {"method": method, "bound": bound, "baseline": group[0]["baseline"]}
        seen = [window for row in group for window in row.get("windows", ())]
        if not seen:
            found.append(line | {"reason": group[0]["reason"]})
            continue
        for name in ("nll", "d_nll", "kl", "kl99", "top1"):
            values = [window[name] for window in seen]
            line[name] = sum(values) / len(values)
            line[f"{name}_interval"] = bootstrap(values)
        for text in sorted({window["text"] for window in seen}):
            values = [window["d_nll"] for window in seen if window["text"] == text]
            line[f"d_nll {text}"] = sum(values) / len(values)
        ran = [row for row in group if "windows" in row]
        line["windows"] = len(seen)
        line["peak_bytes"] = max(row["peak_bytes"] for row in ran)
        for name in ("attended", "link_bytes", "retrieval_rate"):
            line[name] = sum(row[name] for row in ran) / len(ran)
        line |= {"keeps_all": ran[0]["keeps_all"], "parameters": ran[0]["parameters"]}
        found.append(line)
    return found


def line(summary: Row, context_bytes: int) -> str:
    head = f"{summary['method']:34} {summary['bound']:4}"
    if "reason" in summary:
        return f"{head} {summary['reason']}"
    low, high = summary["d_nll_interval"]
    held = "keeps all" if summary["keeps_all"] else f"{summary['peak_bytes'] / context_bytes:8.1%}"
    return (
        f"{head} d-NLL {summary['d_nll']:+.4f} [{low:+.4f}, {high:+.4f}]"
        f"  KL {summary['kl']:.4f}  99 % {summary['kl99']:.3f}  top-1 {summary['top1']:.2%}"
        f"  attended {summary['attended']:5.1%}  held {held}  {summary['windows']} windows"
    )
