"""What must be refused, in tables: ops, methods, models, commands, engines.

Each module has ROWS. test_bad_input.py tries every row, and looks at what the attempt could have
changed before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class Attempt:
    """Something that is about to fail.

    Attributes:
        run: does it.
        state: what it must leave as it was, in values that compare with `==`.
        close: takes back what the attempt was prepared with, and looks whether that works.
    """

    run: Callable[[], Any]
    state: Callable[[], Any] = lambda: None
    close: Callable[[], None] = lambda: None


class Bad(NamedTuple):
    """A row: `make()` prepares the attempt, which raises `error` with a message like `match`."""

    make: Callable[[], Attempt]
    match: str
    error: type[Exception] = ValueError


def bits(value: Any) -> Any:
    """A tensor, or tensors in lists, as something that is equal only if every bit is."""
    if isinstance(value, (list, tuple)):
        return [bits(each) for each in value]
    if not isinstance(value, Tensor) or value.is_meta or value.numel() > 2**24:
        return type(value)  # nothing that could be written, or too large to be kept
    flat = value.detach().contiguous().flatten()
    return value.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes()
