"""The error for arguments whose type differs from the schema.

An op checks no types before it runs. If a call fails, this module goes through its arguments one by
one and names the wrong one, because the first message of the extension, the dispatcher or Python
does not help the caller.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from kvcomp import _torch

NO_MEMORY = "can't allocate memory", "not enough memory", "Storage size calculation"


def explain(op: str, schema: str, values: tuple) -> None:
    """Raise TypeError for the first of `values` that is not of the schema's type, if any is not."""
    for argument, value in zip(_torch.schema_arguments(schema), values, strict=False):
        expect(op, argument.name, str(argument.type), value)


def check_types(op: str, schema: str, *values: Any) -> None:
    """Raise TypeError as `explain` does, ValueError unless all tensors are on one device."""
    explain(op, schema, values)
    first = None
    for argument, value in zip(_torch.schema_arguments(schema), values, strict=False):
        for tensor in value if isinstance(value, list) else [value]:
            if not _is_tensor(tensor):
                continue
            first = first or (argument.name, tensor.device)
            if tensor.device != first[1]:
                raise ValueError(
                    f"kvcomp.{op}: argument '{argument.name}': expected the device of"
                    f" '{first[0]}', {first[1]}, got {tensor.device}"
                )


def check_meta(op: str, schema: str, values: tuple) -> None:
    """Raise ValueError if some tensors are on the meta device and others are not: shapes alone
    would then pass for results."""
    named = zip(_torch.schema_arguments(schema), values, strict=False)
    places = [(a.name, value.device) for a, value in named if _is_tensor(value)]
    if len({device.type == "meta" for _, device in places}) < 2:
        return
    (first, expected), *others = places
    name, device = next(place for place in others if place[1].type != expected.type)
    raise ValueError(
        f"kvcomp.{op}: argument '{name}': expected the device of '{first}', {expected},"
        f" got {device}"
    )


def explain_size(op: str, schema: str, fake: Callable, values: tuple, error: Exception) -> None:
    """Raise ValueError if `error` is the allocator's and a number among `values` is to blame: it
    is larger than every tensor."""
    if type(error) is not RuntimeError or not any(text in str(error) for text in NO_MEMORY):
        return
    named = list(zip(_torch.schema_arguments(schema), values, strict=False))
    counts = [(x, a.name) for a, x in named if str(a.type) == "int" and a.name != "max_len"]
    number, name = max(counts, default=(0, ""))
    if any(number <= size for _, x in named if _is_tensor(x) for size in x.shape):
        return
    try:
        made = fake(*(x.to("meta") if _is_tensor(x) else x for _, x in named))
        results = made if isinstance(made, tuple) else (made,)
        room = f"{sum(result.nbytes for result in results)} bytes"
    except RuntimeError:
        room = "more than 2^63 bytes"
    raise ValueError(
        f"kvcomp.{op}: argument '{name}': expected a number whose results fit the memory,"
        f" got {number} for {room}"
    ) from error


def expect(op: str, name: str, kind: str, value: Any) -> None:
    """Raise TypeError unless `value` is what a schema calls `kind`."""
    if kind == "List[Tensor]" and isinstance(value, list):
        for place, each in enumerate(value):
            expect(op, f"{name}[{place}]", "Tensor", each)
        return
    fits, words = KINDS[kind]
    if not fits(value):
        raise TypeError(
            f"kvcomp.{op}: argument '{name}': expected {words}, got {_said(value)}"
        ) from None


def default_scale(q: Any) -> float:
    """1 / sqrt(D) for q [..., D]. For anything else 1.0; the op then raises its own error."""
    return q.shape[-1] ** -0.5 if _is_tensor(q) and q.ndim and q.shape[-1] else 1.0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_whole(value: Any) -> bool:
    try:
        return -(2**63) <= operator.index(value) < 2**63
    except (TypeError, ValueError, RuntimeError):  # the last two: tensors of several, or of floats
        return False


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and float(value) is not None
    except (TypeError, ValueError, RuntimeError):
        return False


KINDS = {  # of a schema -> whether a value is of it, and what to call it
    "Tensor": (_is_tensor, "a tensor"),
    "Optional[Tensor]": (lambda value: value is None or _is_tensor(value), "a tensor or None"),
    "List[Tensor]": (lambda value: False, "a list of tensors"),
    "int": (_is_whole, "a whole number of 64 bits"),
    "float": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
}


def _said(value: Any) -> str:
    """The value if it is short, otherwise its type."""
    if value is None or isinstance(value, (str, Real)):
        return repr(value)
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
