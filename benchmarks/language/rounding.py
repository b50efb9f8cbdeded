"""How a reading keeps K and V: as the model makes them, in eight bits, or rounded for comparison.

The controls say what a figure of eight bits means: bf16 is what is stored today, int8-plain leaves
out the Hadamard matrix, and int4 must be seen to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache import LayerCache
from kvcomp.cache.rows import EightBits


def _as_they_are(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def _in_bf16(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype)


def _in_int4(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """With one scale per token and head, K turned before and back again."""
    return ops.hadamard(_rounded(ops.hadamard(k.contiguous()), 7)), _rounded(v, 7)


def _rounded(x: Tensor, most: int) -> Tensor:
    """The last dimension in steps of which its largest element is `most`."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / most
    return (x / step).round() * step


@dataclass(frozen=True)
class Kind:
    """Attributes:
    eight_bits: of the caches.
    rounded: what becomes of K and V [B, Hkv, n, D] before they come into a cache.
    """

    eight_bits: EightBits | None = None
    rounded: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _as_they_are


KINDS = {
    "model": Kind(),
    "int8": Kind(EightBits(turn=True)),
    "int8-plain": Kind(EightBits(turn=False)),
    "bf16": Kind(rounded=_in_bf16),
    "int4": Kind(rounded=_in_int4),
}


@contextmanager
def rounding(name: str) -> Iterator[None]:
    """Within it, every cache keeps K and V as rounded by a kind of `KINDS`."""
    append, rounded = LayerCache.append, KINDS[name].rounded

    def rounding_append(
        layer: LayerCache, k: Tensor, v: Tensor, valid: Tensor | None = None
    ) -> None:
        append(layer, *rounded(k, v), valid)

    LayerCache.append = rounding_append
    try:
        yield
    finally:
        LayerCache.append = append
