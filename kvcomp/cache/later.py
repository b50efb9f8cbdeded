"""Attributes that an object gets after its construction. Reading one earlier raises a clear error.

Once set they are plain instance attributes, so no property slows down a decode step.
"""

from __future__ import annotations

from typing import Any


class _Later:
    """The class attribute that stands for such an attribute until it is set."""

    def __init__(self, when: str) -> None:
        self.when = when

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: object | None, owner: type | None = None) -> Any:
        if holder is None:
            return self
        raise AttributeError(
            f"kvcomp: {type(holder).__name__}.{self.name}: there is none before {self.when}"
        )


def later(when: str) -> Any:
    """Declare an attribute that is set later; `when` says in words when."""
    return _Later(when)


def known(holder: object, name: str) -> bool:
    """Whether the attribute has been set."""
    return name in holder.__dict__


def forget(holder: object, *names: str) -> None:
    """Delete the attributes that have been set."""
    for name in names:
        holder.__dict__.pop(name, None)
