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

from kvcomp import _torch, ops
from kvcomp.ops.linear_rows import MAX_ROWS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    taken = [layer for layer in layers if _is_plain(layer)]
    for layer in taken:
        # A bound method, so that a copied or pickled layer has its own.
        layer.__dict__["forward"] = MethodType(forward, layer)

    def undo() -> None:
        for layer in taken:
            if getattr(layer.__dict__.get("forward"), "__func__", None) is forward:
                del layer.__dict__["forward"]

    return LinearLayers(len(taken), len(layers) - len(taken)), undo


def _is_plain(layer: nn.Linear) -> bool:
    weight = layer._parameters.get("weight")
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.dtype in DTYPES
        and weight.stride(-1) == 1
    )


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
    weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
    if (
        (is_compiling() or not tracing_state())  # a traced size is a tensor
        and type(input) is Tensor
        and type(weight) is nn.Parameter
        and input.numel() <= MAX_ROWS * weight.shape[-1]
        and input.is_cpu
        and weight.is_cpu
        and weight.dtype in DTYPES
        and not autocasting("cpu")
        and not (
            grad_enabled()
            and (input.requires_grad or weight.requires_grad or _wants_gradient(bias))
        )
    ):
        if is_compiling():
            if not packing:
                return ops.linear_rows(input, weight, bias)
            return type(self).forward(self, input)
        if not (num_dispatch_modes() or num_function_modes() or transforming()):
            try:
                return COMPUTE(input, weight, bias)
            except (TypeError, ValueError):  # torch takes other inputs, or explains its error
                pass
    return type(self).forward(self, input)


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


def _wants_gradient(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


# Looked up once, because a look-up by dotted name costs some 20 ns per call.
COMPUTE = ops.OPS["linear_rows"].impl("cpu")
autocasting, grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled
is_compiling, tracing_state = torch.compiler.is_compiling, _torch.tracing_state
num_dispatch_modes, num_function_modes = _torch.num_dispatch_modes, _torch.num_function_modes
transforming = _torch.transforming
