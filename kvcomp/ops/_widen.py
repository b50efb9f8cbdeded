"""Arguments of an op converted to a wider floating dtype, in which its reference computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def in_float32(args: Iterable) -> list:
    """The arguments with all 16-bit tensors, including tensors in lists, converted to fp32."""
    return [_widened(a, HALF, torch.float32) for a in args]


def in_float64(args: Iterable) -> list:
    """The arguments with all floating tensors in fp64. The reference on them counts as exact."""
    return [_widened(a, (*HALF, torch.float32), torch.float64) for a in args]


def _widened(argument: object, narrow: tuple[torch.dtype, ...], wide: torch.dtype) -> object:
    if isinstance(argument, list):
        return [_widened(each, narrow, wide) for each in argument]
    if isinstance(argument, Tensor) and argument.dtype in narrow:
        return argument.to(wide)
    return argument
