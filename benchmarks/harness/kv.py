"""How contenders keep K and V: the option --kv, and labels such as `delta@int8`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvcomp.cache.rows import KINDS, EightBits


def add_kv(add: Callable[..., Any], kinds: Iterable[str] = KINDS) -> None:
    """The option, with `add` of a parser."""
    text = "how K and V are kept; with several, every method once for each; default: model"
    add("--kv", nargs="+", choices=kinds, default=["model"], help=text)


def labels(names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Every name with every kind; as the model makes them goes without saying."""
    return [name if kind == "model" else f"{name}@{kind}" for kind in kinds for name in names]


def parted(label: str) -> tuple[str, str]:
    """Name and kind of a label."""
    name, _, kind = label.partition("@")
    return name, kind or "model"


def eight_bits(kind: str, dim: int) -> EightBits | None:
    """For a `KVCache` of heads of size `dim`, as `kvcomp.patch` would have it."""
    return None if kind == "model" else EightBits(turn=dim & (dim - 1) == 0)
