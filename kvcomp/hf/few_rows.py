"""Which calls of a layer an op for the few rows of a decode step may answer.

All others go to the layer's own forward: with gradients or autocast, of tensor subclasses, on
another device, and while something watches or rewrites the calls of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kvcomp import _torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer holds its weight as it is, on the CPU, and has a forward of its class alone:
    it is not quantised, sharded, parametrised, offloaded, or replaced."""
    weight = layer._parameters.get("weight")
    return (
        "forward" not in layer.__dict__
        and type(weight) is Parameter
        and weight.is_cpu
        and weight.dtype in DTYPES
        and weight.stride(-1) == 1
    )


def takes(input: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> bool:
    """Whether these tensors are plain ones that ask for a result and nothing else. Whether they fit
    each other, in device, dtype and layout, the op checks."""
    return (
        type(input) is Tensor
        and type(weight) is Parameter
        and not autocasting("cpu")
        and not (
            grad_enabled()
            and (
                input.requires_grad
                or weight.requires_grad
                or (bias is not None and bias.requires_grad)
            )
        )
    )


def undisturbed() -> bool:
    """Whether torch only computes: no mode is active, no transform, and nothing is traced."""
    return not (tracing_state() or num_dispatch_modes() or num_function_modes() or transforming())


def is_on_cpu(input: Tensor, weight: Tensor) -> bool:
    """Whether a kernel takes them: in graphs, nothing is checked before they run."""
    return input.is_cpu and weight.is_cpu and input.dtype == weight.dtype and weight.dtype in DTYPES


# Looked up once, because a look-up by dotted name costs some 20 ns per call.
autocasting, grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled
tracing_state, transforming = _torch.tracing_state, _torch.transforming
num_dispatch_modes, num_function_modes = _torch.num_dispatch_modes, _torch.num_function_modes
