"""Checks of arguments: one clear error each, before anything is decoded."""

from __future__ import annotations

from numbers import Real
from typing import Any


def require(condition: bool, where: str, expected: str, got: Any) -> None:
    """Raise ValueError `kvcomp.thinking: {where}: expected {expected}, got {got}` unless."""
    if not condition:
        raise ValueError(f"kvcomp.thinking: {where}: expected {expected}, got {got!r}")


def is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a finite real number."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and float("-inf") < float(value) < float("inf")
