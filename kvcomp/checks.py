"""Checks of arguments. Bad input gets one clear error, before anything is done with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def require(
    condition: bool, where: str, expected: str, got: Any, error: type[Exception] = ValueError
) -> None:
    """Raise `error` with the text "WHERE: expected EXPECTED, got GOT" unless `condition` holds.

    Args:
        where: the call and its argument, as in "kvcomp.Delta: sinks".
    """
    if not condition:
        raise error(f"{where}: expected {expected}, got {got!r}")


def require_one_of(known: Iterable[str], where: str, got: Any) -> None:
    """Raise ValueError unless `got` is one of the `known` names. It ends with the nearest one."""
    names = list(known)
    if got in names:
        return
    near = difflib.get_close_matches(str(got).lower().replace("_", "-"), names, 1, 0.75)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{where}: expected one of {', '.join(names)}, got {got!r}{hint}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number, `least` or more."""
    return is_whole(value) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a finite real number."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and float("-inf") < float(value) < float("inf")
