"""A method as it comes, at a bound on its bytes."""

from __future__ import annotations

from typing import Any

from accuracy.sizes import Room, fit
from kvcomp import METHODS, Method
from kvcomp.reading import as_it_comes


def sized(name: str, bound: int, room: Room, own: dict[str, Any]) -> Method:
    """The method `name` with at most `bound` bytes for a sequence.

    Args:
        own: fields that a variant sets.

    Raises:
        ValueError: the method cannot work with so little.
    """
    kept = as_it_comes(METHODS[name], room.model, bound // room.token_bytes)
    return fit(name, bound, room, {**kept, **own})
