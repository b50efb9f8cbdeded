"""Who is compared: methods and their variants, each as large as a bound on its bytes allows."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_type_hints

from torch import Tensor

from accuracy.sizes import Room, keeps_all
from harness.kv import labels, parted
from harness.store import Row, Store
from kvcomp import METHODS, Method
from kvcomp.cache import Report
from kvcomp.cli.settings import parse
from kvcomp.hf.shape import shape_of
from kvcomp.methods.cost import Place
from kvcomp.reading import read
from language.rounding import KINDS, rounding
from language.sizes import sized
from language.stack import Stack, stackable


@dataclass(frozen=True)
class Contender:
    """A method by its name, or a variant of it: `name:field=value,field=value`, with the way it
    keeps K and V behind an @. It is as large as one that keeps them as the model makes them."""

    label: str

    @property
    def name(self) -> str:
        return parted(self.label)[0].partition(":")[0]

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
        for setting in filter(None, parted(self.label)[0].partition(":")[2].split(",")):
            field, _, text = setting.partition("=")
            if field not in hints:
                raise ValueError(f"kvcomp.language: --methods: {self.name} has no field {field!r}")
            found[field] = parse(setting, hints[field], text.replace("+", ","))
        return found


class Lineup:
    """The contenders of a run, at its bounds, for contexts of `tokens` tokens.

    Raises:
        ValueError: a bad option.
    """

    def __init__(self, model: Any, options: Namespace, tokens: int, prompt: int) -> None:
        self.model, self.bounds = model, options.budgets
        self.contenders = [Contender(label) for label in labels(options.methods, options.kv)]
        self.own = {each.label: each.fields() for each in self.contenders}
        self.room = room_of(model, options.model, tokens, prompt)

    def cells(self) -> list[tuple[Contender, str]]:
        """Every contender at every bound; dense attention once."""
        return [
            (each, "1" if each.name == "full" else bound)
            for bound in self.bounds
            for each in self.contenders
            if each.name != "full" or bound == self.bounds[0]
        ]

    def left(self, store: Store) -> Iterator[tuple[Contender, Row, Method | None]]:
        """The cells that the store does not have, begun."""
        done = store.done()
        for each, bound in self.cells():
            if (each.label, bound) not in done:
                yield each, *self.begin(each, bound)

    def begin(self, each: Contender, bound: str) -> tuple[Row, Method | None]:
        """What is known of a cell before it is run, and the method if it can work there."""
        row: Row = {
            "method": each.label,
            "baseline": METHODS[each.name].baseline,
            "bound": bound,
        }
        limit = int(Fraction(bound) * self.room.context_bytes)
        try:
            method = sized(each.name, limit, self.room, self.own[each.label])
        except ValueError as error:
            return row | {"reason": str(error).partition("\n")[0]}, None
        facts = {"parameters": str(method), "bound_bytes": limit, "keeps_all": keeps_all(method)}
        return row | facts, method


def room_of(model: Any, name: str, tokens: int, prompt: int) -> Room:
    """The longest context of a window."""
    shape = shape_of(model.config, dtype=str(model.dtype).removeprefix("torch."))
    parts = (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize)
    return Room(name, Place(tokens - 1, prompt, *parts), model.dtype, model.device)


def together(
    model: Any, pairs: list[tuple[Row, Method]], ids: Tensor, prompt: int, tick: Callable[[], None]
) -> list[tuple[Tensor, Report]]:
    """`read` for several methods and their rows, in one pass where the model allows it."""
    methods, kinds = [method for _, method in pairs], kinds_of(pairs)
    if not stackable(model):
        found = []
        for method, kind in zip(methods, kinds, strict=True):
            with rounding(kind):
                found.append(read(model, method, ids, prompt, tick, **options(kind)))
        return found
    stack = Stack(model, methods, kinds)
    hidden = stack.read(ids, prompt, tick)
    return list(zip(hidden, stack.reports(), strict=True))


def kinds_of(pairs: list[tuple[Row, Method]]) -> list[str]:
    """How each keeps K and V."""
    return [parted(row["method"])[1] for row, _ in pairs]


def options(kind: str) -> dict[str, Any]:
    """Of `kvcomp.patch`; those that only round have none, see `rounding`."""
    bits = KINDS[kind].eight_bits
    return {} if bits is None else {"kv": "int8", "kv_rotate": None if bits.turn else False}


def measured(report: Report, rows: int) -> Row:
    """What a run of `rows` sequences held and read, per sequence."""
    return {
        "peak_bytes": (report.kv_bytes_peak + report.tracking_bytes_peak) // rows,
        "tracking_bytes": report.tracking_bytes_peak // rows,
        "host_bytes": report.host_bytes_peak // rows,
        "attended": report.tokens_attended / report.tokens_attended_dense,
        "link_bytes": report.link_bytes_fetched / max(report.tokens_decoded, 1),
        "retrieval_rate": report.retrieval_rate,
    }
