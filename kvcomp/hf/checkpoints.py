"""Models in training with gradient checkpointing, whose layers get no cache.

With gradients that is right, because the second run of a layer must not store its tokens again.
Without gradients, as in `generate`, no layer runs twice, and the layers need their cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module


def _checkpointing(decoder: Module) -> list[Module]:
    """The modules of a decoder that checkpoint; none outside of training."""
    modules = decoder.modules() if decoder.training else ()
    return [module for module in modules if getattr(module, "gradient_checkpointing", False)]


def without_cache(decoder: Module, given: dict) -> dict:
    """The arguments of a forward, changed so that it makes no cache if gradients are checkpointed.

    Raises:
        ValueError: the arguments have a cache although gradients are checkpointed.
    """
    if not torch.is_grad_enabled() or not _checkpointing(decoder):
        return given
    if given.get("past_key_values") is not None:
        raise ValueError(
            "kvcomp: past_key_values: a model that trains with gradient checkpointing has no"
            " cache; leave it out, or call the model under torch.no_grad()"
        )
    return given | {"use_cache": False}


@contextmanager
def without_checkpoints(decoder: Module) -> Iterator[None]:
    """A context without checkpointing in the decoder, for forwards without gradients."""
    modules: list[Any] = [] if torch.is_grad_enabled() else _checkpointing(decoder)
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
