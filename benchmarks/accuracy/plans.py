"""What a study compares: methods of one size at several bounds, or a paper's as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from statistics import mean
from typing import Any, Protocol, get_type_hints

from accuracy.sizes import Room, fit
from evaluation.preset import Preset
from harness.store import Row
from kvcomp import METHODS, Method
from kvcomp.cli.settings import parse

WHOLE, PUBLISHED = "1", "as published"


class Plan(Protocol):
    """Methods by name and bound."""

    def pairs(self) -> list[tuple[str, str]]:
        """(name, bound), in the order in which they run."""

    def bound_bytes(self, bound: str) -> int | None:
        """What a sequence may hold on the device; None: no bound."""

    def is_baseline(self, name: str) -> bool: ...

    def published(self, name: str) -> str | None:
        """The accuracy in %, as the paper has it."""

    def method(self, name: str, kv: str, bound: str, rows: Sequence[Row]) -> Method:
        """`rows` are there already. ValueError: the method cannot work at this bound."""


class EqualBytes:
    """Every method as large as each bound allows, and the full cache once.

    Args:
        budgets: shares of the longest context ("1/4", "0.25"), or tokens ("512").
        own: METHOD.FIELD=VALUE, what the user set.
        equal: "tokens": in eight bits a method has the tokens that fit as the model makes K and V;
            "bytes": those that fit in eight bits.

    Raises:
        ValueError: a budget or a setting that is none.
    """

    def __init__(
        self,
        methods: list[str],
        budgets: list[str],
        own: dict[str, dict[str, Any]],
        room: Room,
        equal: str = "tokens",
    ) -> None:
        self.methods, self.own, self.room, self.equal = methods, own, room, equal
        self.bounds = {text: self._bytes(text) for text in budgets}
        self._fitted: dict[tuple[str, str, Room], Method | ValueError] = {}

    def pairs(self) -> list[tuple[str, str]]:
        full = [("full", WHOLE)] if "full" in self.methods else []
        others = [name for name in self.methods if name != "full"]
        return full + [(name, bound) for bound in self.bounds for name in others]

    def bound_bytes(self, bound: str) -> int | None:
        return self.bounds.get(bound)

    def is_baseline(self, name: str) -> bool:
        return METHODS[name].baseline

    def published(self, name: str) -> None:
        return None

    def method(self, name: str, kv: str, bound: str, rows: Sequence[Row]) -> Method:
        limit = self.bounds.get(bound, self.room.context_bytes)
        room = self.room.keeping(kv) if self.equal == "bytes" else self.room
        key = name, bound, room
        if key not in self._fitted:
            try:
                found = fit(name, limit, room, self.own.get(name, {}))
            except ValueError as error:
                found = error
            self._fitted[key] = found
        found = self._fitted[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _bytes(self, text: str) -> int:
        try:
            share = Fraction(text)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if share <= 0 or (share >= 1 and share.denominator != 1):
            raise ValueError(
                f"kvcomp.accuracy: --budgets: expected shares such as 1/4, or tokens, got {text!r}"
            )
        return int(share * (self.room.context_bytes if share < 1 else self.room.token_bytes))


class Published:
    """The methods of a preset. Where a budget is a share of the mean length of the full cache's
    runs, that is known once these are done, which come first."""

    def __init__(self, preset: Preset, room: Room) -> None:
        self.preset, self.model = preset, room.model
        self.known = preset.methods(room.model, length=room.place.seen)  # some of other sizes yet
        self._methods: dict[str, Method] | None = None

    def pairs(self) -> list[tuple[str, str]]:
        return [(name, PUBLISHED) for name in self.known]

    def bound_bytes(self, bound: str) -> None:
        return None

    def is_baseline(self, name: str) -> bool:
        return self.known[name].baseline

    def published(self, name: str) -> str | None:
        return self.preset.figures(self.model).get(name)

    def method(self, name: str, kv: str, bound: str, rows: Sequence[Row]) -> Method:
        if name == "full" or not self.preset.needs_length(self.model):
            return self.known[name]
        if self._methods is None:
            full = [row for row in rows if row["method"] == "full" and row["reason"] is None]
            full = [row for row in full if row["seed"] == full[0]["seed"]]
            lengths = [
                prompt + new
                for row in full
                for prompt, new in zip(row["prompts"], row["generated"], strict=True)
            ]
            if not lengths:
                raise ValueError("the full cache's runs, of whose length it gets a share, failed")
            self._methods = self.preset.methods(self.model, length=mean(lengths))
        return self._methods[name]


def own_fields(settings: list[str], methods: list[str]) -> dict[str, dict[str, Any]]:
    """METHOD.FIELD=VALUE by method and field.

    Raises:
        ValueError: no such method in the study, no such field, or no value of its type.
    """
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, _, rest = setting.partition(".")
        field, _, text = rest.partition("=")
        if name not in methods:
            raise ValueError(
                f"kvcomp.accuracy: --set: expected METHOD.FIELD=VALUE of a method in this study,"
                f" got {setting!r}"
            )
        known = [field.name for field in fields(METHODS[name])]
        if field not in known:
            raise ValueError(
                f"kvcomp.accuracy: --set: {name} has no field {field!r}; it has: {', '.join(known)}"
            )
        found.setdefault(name, {})[field] = parse(
            setting, get_type_hints(METHODS[name])[field], text
        )
    return found
