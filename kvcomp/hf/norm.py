"""Fast RMS norms for the few input rows of a decode step, while a model is patched.

Models make an RMS norm from six small torch ops. Their calls take several times as long as their
work on one row. The op `norm_rows` is one call. It replaces the forward of every layer that a trial
shows to compute the same; all other calls go to the original forward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kvcomp import ops
from kvcomp.hf.few_rows import is_plain, takes, undisturbed

MOST = 1 << 18  # elements: 32 rows of 8192
EPS = "_kvcomp_eps"  # attribute of a layer: the name of the one that holds its eps


def speed_up_norms(model: nn.Module) -> tuple[int, Callable[[], None]]:
    """Route the RMS norms of a model on the CPU through `norm_rows`, for few rows.

    Returns:
        the number of these layers, and a function that undoes the change.
    """
    taken = []
    for layer in model.modules():
        if (eps := _eps_of(layer)) is not None:
            # A bound method, so that a copied or pickled layer has its own.
            layer.__dict__ |= {EPS: eps, "forward": MethodType(forward, layer)}
            taken.append(layer)

    def undo() -> None:
        for layer in taken:
            layer.__dict__.pop(EPS, None)
            if getattr(layer.__dict__.get("forward"), "__func__", None) is forward:
                del layer.__dict__["forward"]

    return len(taken), undo


@torch.no_grad()
def _eps_of(layer: nn.Module) -> str | None:
    """The attribute with the eps of an RMS norm; None: the layer computes something else."""
    held = [*layer._parameters.values(), *layer._buffers.values(), *layer._modules.values()]
    weight = held[0] if len(held) == 1 and is_plain(layer) else None
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.numel():
        return None
    weight = weight.detach()
    generator = torch.Generator().manual_seed(0)
    # Neither centred nor of one size: a mean that is subtracted shows, and the eps beside x^2.
    x = torch.randn(2, len(weight), generator=generator) + torch.tensor([[1.0], [-1.0]])
    x = (x * torch.tensor([[1.0], [1e-3]])).to(weight.dtype)
    limits = torch.finfo(weight.dtype)
    found = None
    for name, eps in vars(layer).items():
        if type(eps) is not float or not 0.0 < eps < 0.1:
            continue
        try:
            found = type(layer).forward(layer, x) if found is None else found
        except Exception:  # it takes other inputs
            return None
        want = COMPUTE(x, weight.contiguous(), eps)
        if type(found) is not Tensor or (found.shape, found.dtype) != (want.shape, want.dtype):
            return None
        wide = 2 if weight.dtype != torch.float32 else 32  # roundings
        if torch.allclose(found, want, rtol=wide * limits.eps, atol=limits.tiny):
            return name
    return None


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a norm. It sees all changes to the layer since the patch."""
    if len(args) == 1 and not kwargs and not is_compiling():
        input, weight = args[0], self._parameters.get("weight")
        if takes(input, weight) and undisturbed() and input.numel() <= MOST:
            state = self.__dict__
            try:
                return COMPUTE(input, weight, state.get(state.get(EPS, "")))
            except (TypeError, ValueError):  # the layer takes other inputs, or explains its error
                pass
    return type(self).forward(self, *args, **kwargs)


# Looked up once, because a look-up by dotted name costs some 20 ns per call.
COMPUTE = ops.OPS["norm_rows"].impl("cpu")
is_compiling = torch.compiler.is_compiling
