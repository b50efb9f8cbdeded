"""Attributes that an object gets later than its construction, and that say so if asked before.

They are plain instance attributes once they are set: no property is in the way of a decode step.
"""

from __future__ import annotations

from typing import Any


class _Later:
    """What a class has under the name of such an attribute."""

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
    """The class attribute of an attribute that is set no earlier than `when`, in words."""
    return _Later(when)


def known(holder: object, name: str) -> bool:
    """Whether the attribute has been set."""
    return name in holder.__dict__


def forget(holder: object, *names: str) -> None:
    """Back to before they were set, those that were."""
    for name in names:
        holder.__dict__.pop(name, None)
