"""What outlasts a call that runs in inference mode.

Tensors that torch makes in inference mode cannot be changed outside of it. What a cache keeps is
changed by later calls, which may be in either mode, so none of it is made there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outlasting(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` outside of inference mode, without gradients where the caller is in it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # A compiled step keeps what it changes in memory that was there before it.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
