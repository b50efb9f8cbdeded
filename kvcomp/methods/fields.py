"""Checks of the types of a method's fields, and the short name of a model.

A wrong type such as 2.5 pages fails when the method is made and not in a kernel.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from numbers import Integral, Real
from typing import Any

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}


def check_types(method: Any) -> None:
    """Raise TypeError for the first field whose type differs from its annotation.

    This checks numbers, strings, flags, None and tuples of them; other annotations accept anything.
    A list is replaced by a tuple, so that a method can be compared and hashed.
    """
    cls: type = type(method)
    for name, hint in _hints(cls).items():
        value = getattr(method, name)
        if not _fits(value, hint):
            raise TypeError(
                f"kvcomp.{type(method).__name__}: {name}: expected {_words(hint)}, got {value!r}"
            )
        if isinstance(value, list) and _is_tuple(hint):
            object.__setattr__(method, name, tuple(value))


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # one that is imported for type checkers only
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    if hint is type(None):
        return value is None
    if _is_union(hint):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        of, *others = typing.get_args(hint)
        return (
            isinstance(value, (tuple, list))
            and (others == [...] or len(value) == len(others) + 1)
            and all(_fits(each, of) for each in value)
        )
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return hint is not str or isinstance(value, str)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_tuple(hint: Any) -> bool:
    of = typing.get_args(hint) if _is_union(hint) else (hint,)
    return any(typing.get_origin(each) is tuple for each in of)


def _words(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if _is_union(hint):
        return " or ".join(_words(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        of, *others = typing.get_args(hint)
        many = "several" if others == [...] else len(others) + 1
        return f"a tuple of {many}, each {_words(of)}"
    return WORDS[hint]


def short_name(method: type, model: Any) -> str:
    """The last part of a model's name, under which published settings are listed.

    Args:
        model: the name or path of a model, or the model itself.

    Raises:
        TypeError: `model` is neither.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", model)
    if not isinstance(name, str):
        raise TypeError(
            f"kvcomp.{method.__name__}: model: expected a name or a transformers model,"
            f" got {type(model).__name__}"
        )
    return name.rstrip("/").rsplit("/", 1)[-1]
