"""Checks of arguments, in the name of `kvcomp.thinking`."""

from __future__ import annotations

from typing import Any

from kvcomp import checks
from kvcomp.checks import is_count, is_number

__all__ = ["is_count", "is_number", "require"]


def require(condition: bool, where: str, expected: str, got: Any) -> None:
    """Raise ValueError `kvcomp.thinking: {where}: expected {expected}, got {got}` unless."""
    checks.require(condition, f"kvcomp.thinking: {where}", expected, got)
