"""A method as it comes, at a bound on its bytes: its defaults for all that is no size."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from accuracy.sizes import Room, fit
from kvcomp import METHODS, Method
from kvcomp.methods.retrieval import Retrieval

# What `fit` or `Method.example` scales; everything else is as the method has it for the model.
SIZES = {"budget", "recent", "local", "newest", "segment", "partition", "group"}
SIZES |= {"output_window", "output_cluster"}


def sized(name: str, bound: int, room: Room, own: dict[str, Any]) -> Method:
    """The method `name` with at most `bound` bytes for a sequence.

    Args:
        own: fields that a variant sets.

    Raises:
        ValueError: the method cannot work with so little.
    """
    cls = METHODS[name]
    tokens = bound // room.token_bytes
    default, example = cls.for_model(room.model), cls.example(tokens - tokens % 16)
    sizes = SIZES if issubclass(cls, Retrieval) else SIZES | {"window"}
    # The first tokens count for a retrieval's budget, so they are scaled with it.
    sizes = sizes | {"sinks"} if issubclass(cls, Retrieval) else sizes
    kept = {
        field.name: getattr(default, field.name)
        for field in fields(cls)
        if field.name not in sizes and field.init
    }
    if "segment" in {field.name for field in fields(cls)} and hasattr(default, "page_size"):
        longest = example.segment[1] - default.page_size  # a page is a segment
        example = replace(example, budget=example.budget + longest, page_size=default.page_size)
    return fit(name, bound, room, {**kept, **own})
