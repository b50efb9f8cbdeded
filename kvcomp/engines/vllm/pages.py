"""A layer's cache in vLLM, as K and V that kvcomp's ops read in place.

vLLM's CPU kernels store the K of a block transposed. For the layers that it runs kvcomp writes the
blocks itself, in the order of vLLM's GPU backends: a page is [tokens, Hkv, 2 * D], K before V.
"""

from __future__ import annotations

from torch import Tensor

from kvcomp import ops


def rows(cache: Tensor) -> Tensor:
    """[pages, Hkv, P, 2 * D], as vLLM shapes its memory -> [pages * P, Hkv, 2 * D], a view."""
    pages, heads, size, width = cache.shape
    return cache.view(pages * size, heads, width)


def keys_and_values(cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of all pages, pools [pages, Hkv, P, D]: views."""
    pages, heads, size, width = cache.shape
    pool = cache.view(pages, size, heads, width).transpose(1, 2)
    return pool[..., : width // 2], pool[..., width // 2 :]


def write(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Store new tokens.

    Args:
        key, value: [n, Hkv, D], n at least as many as `slots`.
        slots: [n] int64, places in `rows(cache)`; negative ones are padding.
    """
    count = len(slots)
    ops.store_slots(key[:count], value[:count], *keys_and_values(cache), slots)
