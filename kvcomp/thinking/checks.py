"""Checks of arguments, in the name of `kvcomp.thinking`."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any

from kvcomp import checks
from kvcomp.checks import is_count, is_number

__all__ = ["is_count", "is_number", "require", "require_fields", "require_texts"]


def require(condition: bool, where: str, expected: str, got: Any) -> None:
    """Raise ValueError `kvcomp.thinking: {where}: expected {expected}, got {got}` unless."""
    checks.require(condition, f"kvcomp.thinking: {where}", expected, got)


def require_texts(texts: Any, where: str) -> None:
    """Raise ValueError unless `texts` is a tuple or list of texts, none of them empty, which every
    other text would end in."""
    good = isinstance(texts, tuple | list) and len(texts) > 0
    good = good and all(isinstance(each, str) and each != "" for each in texts)
    require(good, where, "a tuple of texts, none of them empty", texts)


def require_fields(prompt: Any, names: Sequence[str], where: str) -> None:
    """Raise ValueError unless a prompt for `str.format` has the fields `names`, and no others."""
    expected = "a prompt with " + " and ".join("{" + name + "}" for name in names)
    expected += ", other braces doubled"
    require(isinstance(prompt, str), where, expected, prompt)
    try:
        found = {field for _, field, _, _ in Formatter().parse(prompt) if field is not None}
        prompt.format(**dict.fromkeys(names, ""))
    except (ValueError, LookupError, AttributeError):
        found = set()
    require(found == set(names), where, expected, prompt)
