"""Methods as they come, for contexts shorter than those that their defaults are made for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from kvcomp.methods import METHODS, LazyEviction, Method
from kvcomp.methods.retrieval import Retrieval

STEP = 16  # tokens: budgets are whole pages
# What grows with a budget; everything else is as the method has it for the model.
SIZES = {"budget", "recent", "local", "newest", "segment", "partition", "group"}
SIZES |= {"output_window", "output_cluster"}


def as_it_comes(cls: type[Method], model: str, tokens: int) -> dict[str, Any]:
    """Fields that are no sizes, as `for_model` has them; LazyEviction's window in proportion to
    `tokens`, which are budget and window; and segments of the output as long as clusters of the
    prompt, since the digests of short ones would fill the room of a small budget."""
    retrieves = issubclass(cls, Retrieval)
    sizes = SIZES | ({"sinks"} if retrieves else {"window"})
    default = cls.for_model(model)
    own = [field.name for field in fields(cls) if field.init and field.name not in sizes]
    kept = {name: getattr(default, name) for name in own}
    if isinstance(default, LazyEviction):
        kept["window"] = max(1, tokens * default.window // (default.budget + default.window))
    if size := kept.get("cluster_size"):
        kept["segment"] = (-(-size // 2), size)
    return kept


def scaled(name: str, tokens: int, model: str) -> Method:
    """The method `name` with a budget of `tokens`, its other sizes in proportion.

    Raises:
        ValueError: the method cannot work with so few.
    """
    cls = METHODS[name]
    example: Any = cls.example(tokens - tokens % STEP)  # the fields of methods differ
    kept = as_it_comes(cls, model, tokens)
    if isinstance(example, LazyEviction):
        kept["budget"] = tokens - kept["window"]
    method: Any = replace(example, **kept)
    if isinstance(method, Retrieval):  # its segments may be longer than the example's
        spare = example.most_resident - method.most_resident
        return replace(method, budget=method.budget + spare)
    return method
