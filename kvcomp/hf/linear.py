"""Fast linear layers for the few input rows of a decode step, while a model is patched.

torch's CPU kernels for linear layers are made for many rows. With one row per sequence, as in a
decode step, they leave half of the memory bandwidth or more unused. The op `linear_rows` is made
for few rows. It replaces `nn.Linear.forward` wherever it computes the same; all other calls go to
the original forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvcomp import ops
from kvcomp.hf.few_rows import is_on_cpu, is_plain, takes, undisturbed
from kvcomp.ops.linear_rows import MAX_ROWS


class LinearLayers(NamedTuple):
    """The numbers of linear layers that use `linear_rows` for few rows, and that never do."""

    few_rows: int = 0
    other: int = 0


def speed_up(model: nn.Module) -> tuple[LinearLayers, Callable[[], None]]:
    """Route the linear layers of a model on the CPU through `linear_rows`, for few rows.

    Layers that are not an `nn.Linear` with a plain weight keep their forward: quantised, sharded,
    parametrised and offloaded layers, subclasses, and layers with a replaced forward. Hooks and
    adapters around a layer see no difference.

    Returns:
        the number of layers of both kinds, and a function that undoes the change.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    taken = [layer for layer in layers if type(layer) is nn.Linear and is_plain(layer)]
    for layer in taken:
        # A bound method, so that a copied or pickled layer has its own.
        layer.__dict__["forward"] = MethodType(forward, layer)

    def undo() -> None:
        for layer in taken:
            if getattr(layer.__dict__.get("forward"), "__func__", None) is forward:
                del layer.__dict__["forward"]

    return LinearLayers(len(taken), len(layers) - len(taken)), undo


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies by the weight that it holds and does nothing else, patched or not.
    A hook of accelerate may bring its input to its device."""
    own = layer.__dict__.get("forward")
    brings = getattr(getattr(layer, "_hf_hook", None), "offload", True) is False
    return (
        type(layer) is nn.Linear
        and layer.weight.is_floating_point()
        and (own is None or brings or getattr(own, "__func__", None) is forward)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """Replaces `nn.Linear.forward`. It sees all changes to the layer since the patch."""
    parameters = self._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or not takes(input, weight, bias):
        return type(self).forward(self, input)
    if is_compiling():
        if not packing and is_on_cpu(input, weight) and _are_few(input, weight):
            return ops.linear_rows(input, weight, bias)
    elif undisturbed() and _are_few(input, weight):  # a traced size is a tensor
        try:
            return COMPUTE(input, weight, bias)
        except (TypeError, ValueError):  # torch takes other inputs, or explains its error
            pass
    return type(self).forward(self, input)


def _are_few(input: Tensor, weight: Tensor) -> bool:
    return input.numel() <= MAX_ROWS * weight.shape[-1]


packing = False  # whether inductor is to pack the weights of what compiles now


@contextmanager
def left_to_torch() -> Iterator[None]:
    """Within, compiled linear layers are torch's."""
    global packing
    before, packing = packing, True
    try:
        yield
    finally:
        packing = before


# Looked up once, because a look-up by dotted name costs some 20 ns per call.
COMPUTE = ops.OPS["linear_rows"].impl("cpu")
is_compiling = torch.compiler.is_compiling
