"""Tensors that outlast a call in inference mode.

torch does not allow changes to tensors made in inference mode outside of it. Later calls in either
mode change the tensors of a cache, so they are never made in inference mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from kvcomp._torch import OutsideInference

P = ParamSpec("P")
R = TypeVar("R")


def outlasting(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` outside of inference mode. If the caller is in it, without gradients."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # A compiled step only changes tensors that existed before it.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with OutsideInference():
            return function(*args, **kwargs)

    return run
