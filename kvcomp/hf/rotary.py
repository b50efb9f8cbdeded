"""Fast rotary embeddings for the single token of a decode step, while a model is patched.

Models rotate queries and keys by a function of their module, `apply_rotary_pos_emb`, in sixteen
small torch ops. The op `rotate_rows` gives the same bits in one call. An attention module whose
forward calls such a function gets the same forward, with another function under that name. So the
change ends with the patch, and other models of the same class do not see it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kvcomp import ops
from kvcomp.hf.few_rows import DTYPES, autocasting, grad_enabled, undisturbed

NAME = "apply_rotary_pos_emb"
TURNED = "_kvcomp_turned"  # attribute of a module: its forward that calls `rotate_rows`
MOST = 1 << 16  # elements of the queries


class Globals(dict):
    """The names that a function sees: those of its module, at any time, but for some."""

    def __init__(self, original: dict[str, Any], **others: Any) -> None:
        super().__init__(others)
        self.original = original

    def __missing__(self, name: str) -> Any:
        return self.original[name]


def speed_up_rotations(model: nn.Module) -> tuple[int, Callable[[], None]]:
    """Route the rotations of a model on the CPU through `rotate_rows`, for few tokens.

    Returns:
        the number of these attention modules, and a function that undoes the change.
    """
    found: dict[Callable, Callable | None] = {}  # by the forward of a class
    taken = []
    for module in model.modules():
        original = getattr(type(module), "forward", None)
        if not isinstance(original, FunctionType) or NAME not in original.__code__.co_names:
            continue
        if original not in found:
            found[original] = _turned(original)
        plain = "forward" not in module.__dict__ and all(x.is_cpu for x in module.parameters())
        if plain and (turned := found[original]) is not None:
            module.__dict__ |= {TURNED: turned, "forward": MethodType(forward, module)}
            taken.append(module)

    def undo() -> None:
        for module in taken:
            module.__dict__.pop(TURNED, None)
            if getattr(module.__dict__.get("forward"), "__func__", None) is forward:
                del module.__dict__["forward"]

    return len(taken), undo


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of an attention module."""
    turned = self.__dict__.get(TURNED)
    if turned is None or is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return turned(self, *args, **kwargs)


def _turned(original: FunctionType) -> Callable | None:
    """The same function, which rotates few tokens by the op; None: its module's rotation is another
    one."""
    names = original.__globals__
    rotation = names.get(NAME)
    if not callable(rotation) or not _is_usual(rotation):
        return None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = names[NAME]  # somebody may have replaced it since
        if (
            given is rotation
            and not args
            and not kwargs
            and type(q) is Tensor
            and q.is_cpu
            and q.numel() <= MOST
            and q.shape[-1] == cos.shape[-1]
            and q.dtype == cos.dtype
            and not (grad_enabled() and (q.requires_grad or k.requires_grad))
            and not autocasting("cpu")
            and undisturbed()
        ):
            try:
                return COMPUTE(q, k, cos, sin)
            except (TypeError, ValueError):  # it takes other inputs, or explains its error
                pass
        return given(q, k, cos, sin, *args, **kwargs)

    seen = Globals(names, **{NAME: rotate})
    turned = FunctionType(
        original.__code__, seen, original.__name__, original.__defaults__, original.__closure__
    )
    turned.__kwdefaults__ = original.__kwdefaults__
    return turned


@torch.no_grad()
def _is_usual(rotation: Callable) -> bool:
    """Whether a rotation gives the bits of the op, in every dtype."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        q, k, angles = (
            torch.randn(2, heads, 3, 32, generator=generator).to(dtype) for heads in (3, 2, 2)
        )
        cos, sin = angles.unbind(1)
        try:
            found = rotation(q, k, cos, sin)
        except Exception:  # it takes other inputs
            return False
        if type(found) is not tuple or len(found) != 2:
            return False
        for got, want in zip(found, COMPUTE(q, k, cos, sin), strict=True):
            if type(got) is not Tensor or got.dtype != dtype or not torch.equal(got, want):
                return False
    return True


# Looked up once, because a look-up by dotted name costs some 20 ns per call.
COMPUTE = ops.OPS["rotate_rows"].impl("cpu")
is_compiling = torch.compiler.is_compiling
