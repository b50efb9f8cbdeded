"""Loss on real text: every method at equal bytes, teacher-forced through decode steps."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_type_hints

from torch import Tensor

from accuracy.intervals import bootstrap
from accuracy.sizes import Room, keeps_all
from harness.record import meta
from kvcomp import METHODS, Method
from kvcomp.cache import Report
from kvcomp.cli.generate import parse
from kvcomp.hf.shape import shape_of
from kvcomp.methods.cost import Place
from kvcomp.reading import Dense, checksums, read, windows
from language.sizes import sized
from language.stack import Stack, stackable
from language.store import Row, Store

PROMPT_SHARE = 8  # of a window: so that a quarter of its bytes can hold the prompt, and more
KEY = ("method", "bound", "first")


@dataclass(frozen=True)
class Contender:
    """A method by its name, or a variant of it: `name:field=value,field=value`."""

    label: str

    @property
    def name(self) -> str:
        return self.label.partition(":")[0]

    def fields(self) -> dict[str, Any]:
        """What the variant sets.

        Raises:
            ValueError: no such method, field or value.
        """
        if self.name not in METHODS:
            raise ValueError(
                f"kvcomp.language: --methods: expected {', '.join(METHODS)}, got {self.name!r}"
            )
        hints = get_type_hints(METHODS[self.name])
        found = {}
        for setting in filter(None, self.label.partition(":")[2].split(",")):
            field, _, text = setting.partition("=")
            if field not in hints:
                raise ValueError(f"kvcomp.language: --methods: {self.name} has no field {field!r}")
            found[field] = parse(setting, hints[field], text.replace("+", ","))
        return found


def room_of(model: Any, name: str, tokens: int, prompt: int) -> Room:
    """The longest context of a window."""
    shape = shape_of(model.config, dtype=str(model.dtype).removeprefix("torch."))
    parts = (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize)
    return Room(name, Place(tokens - 1, prompt, *parts), model.dtype, model.device)


def together(
    model: Any, methods: list[Method], ids: Tensor, prompt: int, tick: Callable[[], None]
) -> list[tuple[Tensor, Report]]:
    """`read` for several methods, in one pass where the model allows it."""
    if not stackable(model):
        return [read(model, method, ids, prompt, tick) for method in methods]
    stack = Stack(model, methods)
    hidden = stack.read(ids, prompt, tick)
    return list(zip(hidden, stack.reports(), strict=True))


class LossStudy:
    """Cells: a contender at a bound on a batch of windows.

    Raises:
        ValueError: a bad option, or a file with other settings.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Namespace) -> None:
        self.model, self.options = model, options
        self.prompt = options.tokens // PROMPT_SHARE
        self.contenders = [Contender(label) for label in options.methods]
        self.own = {each.label: each.fields() for each in self.contenders}
        self.windows = windows(tokenizer, options.windows, options.tokens)
        self.room = room_of(model, options.model, options.tokens, self.prompt)
        settings = {
            "model": options.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokens": options.tokens,
            "prompt": self.prompt,
            "texts": checksums(),
            "windows": [[window.text, window.first] for window in self.windows],
        }
        facts = meta(
            "language-loss",
            model.device.type,
            context_bytes=self.room.context_bytes,
            token_bytes=self.room.token_bytes,
        )
        self.store = Store(options.json, KEY, settings, facts)

    def cells(self) -> list[tuple[Contender, str, int]]:
        batches = range(0, len(self.windows), self.options.batch)
        bounds = self.options.budgets
        return [
            (each, "1" if each.name == "full" else bound, first)
            for first in batches
            for bound in bounds
            for each in self.contenders
            if each.name != "full" or bound == bounds[0]
        ]

    def run(self, bar: Callable[[str, int], Callable[[], None]]) -> Iterator[Row]:
        """The cells that are not there yet, each written as soon as it is done."""
        done = self.store.done()
        left = [cell for cell in self.cells() if (cell[0].label, *cell[1:]) not in done]
        ready: list[tuple[Row, Method]] = []
        for cell in left:
            row, method = self.begin(*cell)
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

    def begin(self, each: Contender, bound: str, first: int) -> tuple[Row, Method | None]:
        """What is known of a cell before it is read."""
        row: Row = {
            "method": each.label,
            "baseline": METHODS[each.name].baseline,
            "bound": bound,
            "first": first,
        }
        limit = int(Fraction(bound) * self.room.context_bytes)
        try:
            method = sized(each.name, limit, self.room, self.own[each.label])
        except ValueError as error:
            return row | {"reason": str(error).partition("\n")[0]}, None
        facts = {"parameters": str(method), "bound_bytes": limit, "keeps_all": keeps_all(method)}
        return row | facts, method

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
        methods = [method for _, method in pairs]
        results = together(self.model, methods, ids, self.prompt, bar(what, dense.steps))
        figures = dense.compare([hidden for hidden, _ in results], rows)
        for (row, _), (_, report), found in zip(pairs, results, figures, strict=True):
            row = row | {
                "peak_bytes": (report.kv_bytes_peak + report.tracking_bytes_peak) // len(ids),
                "tracking_bytes": report.tracking_bytes_peak // len(ids),
                "host_bytes": report.host_bytes_peak // len(ids),
                "attended": report.tokens_attended / report.tokens_attended_dense,
                "link_bytes": report.link_bytes_fetched / max(report.tokens_decoded, 1),
                "retrieval_rate": report.retrieval_rate,
                "windows": [
                    {"text": window.text, "first": window.first, **each}
                    for window, each in zip(self.windows[rows], found, strict=True)
                ],
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
