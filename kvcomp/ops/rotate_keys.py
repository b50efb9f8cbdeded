"""rotate_keys: rotate cached keys to other positions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._arguments import expect
from kvcomp.ops._registry import bind, raw_stream

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def rotate_keys(k: Tensor, shift: Tensor, inv_freq: Tensor) -> None:
    """Shift the positions of keys that carry a rotary embedding, in place, by one shift per row.

    A key rotated for position p becomes a key rotated for p + shift. Elements i and i + R / 2 of a
    key form a pair, as in Llama, Qwen and most other models. Elements from R on have no rotation
    and do not change. The result is rounded to the dtype of `k`, so start from an original copy of
    the keys instead of rotating the same keys in every step.

    Args:
        k: [B, H, T, D], changed in place; strided over B, H and T.
        shift: [B] integer positions, of either sign.
        inv_freq: [R / 2] fp32, the model's frequencies in radians per position, R <= D.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout.
    """
    for name, tensor in (("k", k), ("shift", shift), ("inv_freq", inv_freq)):
        expect("rotate_keys", name, "Tensor", tensor)
    if shift.dtype not in INTEGERS:
        raise TypeError(
            f"kvcomp.rotate_keys: argument 'shift': expected integers, got {shift.dtype}"
        )
    if not inv_freq.is_floating_point():
        raise TypeError(
            "kvcomp.rotate_keys: argument 'inv_freq': expected a floating-point dtype,"
            f" got {inv_freq.dtype}"
        )
    for name, tensor in (("shift", shift), ("inv_freq", inv_freq)):
        if tensor.device != k.device or tensor.layout != torch.strided:
            raise ValueError(
                f"kvcomp.rotate_keys: argument '{name}': expected a dense tensor on the device of"
                f" 'k', {k.device}, got {tensor.layout} on {tensor.device}"
            )
        if tensor.ndim != 1:
            raise ValueError(
                f"kvcomp.rotate_keys: argument '{name}': expected one dimension,"
                f" got shape {list(tensor.shape)}"
            )
    # The native checks know cos and sin only, which nobody has passed.
    if k.ndim == 4 and shift.shape[0] != k.shape[0]:
        raise ValueError(
            f"kvcomp.rotate_keys: argument 'shift': expected B={k.shape[0]} positions,"
            f" got {shift.shape[0]}"
        )
    if k.ndim == 4 and not 1 <= inv_freq.shape[0] <= k.shape[3] // 2:
        raise ValueError(
            "kvcomp.rotate_keys: argument 'inv_freq': expected 1 to D / 2 ="
            f" {k.shape[3] // 2} frequencies, got {inv_freq.shape[0]}"
        )
    angle = shift[:, None].double() * inv_freq.double()  # fp32 would lose far positions
    _op(k, angle.cos().float(), angle.sin().float())


def reference(k, cos, sin):
    half = cos.shape[-1]
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second = k[..., :half].clone(), k[..., half : 2 * half].clone()
    k[..., :half] = first * cos - second * sin
    k[..., half : 2 * half] = second * cos + first * sin


def fake(k, cos, sin):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(k, cos, sin):
        extension.rotate_keys(backend, k, cos, sin, raw_stream(k))

    return run


_op = bind(
    "rotate_keys",
    "(Tensor(a!) k, Tensor cos, Tensor sin) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    triton=True,
)
