"""The positions that a model knows, and how many of them a prompt leaves for output."""

from __future__ import annotations

from typing import Any

from kvcomp.checks import require
from kvcomp.methods import Delethink, Method


def fitting(config: Any, method: Method, columns: int, asked: int, where: str) -> int:
    """The new tokens to decode: `asked`, or as many as the model has positions for.

    Args:
        config: of the model.
        columns: tokens of the prompt.
        where: the call and its argument, for the error.

    Raises:
        ValueError: the prompt alone takes all positions.
    """
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is None or isinstance(method, Delethink) or method.moves_keys:
        return asked  # the method itself bounds the positions
    expected = f"fewer tokens than the {longest} positions that the model knows"
    require(columns < longest, where, expected, columns)
    return min(asked, longest - columns)
