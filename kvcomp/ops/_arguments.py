"""The error for arguments whose type differs from the schema.

An op checks no types before it runs. If a call fails, this module goes through its arguments one by
one and names the wrong one, because the first message of the extension, the dispatcher or Python
does not help the caller.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch

from kvcomp import _torch


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
