"""rotate_keys: move cached keys to other positions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._arguments import expect
from kvcomp.ops._registry import bind, raw_stream

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def rotate_keys(k: Tensor, shift: Tensor, inv_freq: Tensor) -> None:
    """Re-base keys that carry their rotary embedding by a common shift of each row, in place.

    A key rotated for position p becomes one rotated for p + shift. Elements i and i + R / 2 of a
    key form a pair (the layout of Llama, Qwen and most others); elements from R on carry no
    rotation and are left alone. Rounds to the dtype of `k` each time, so rotate an untouched copy
    anew rather than the same keys step after step.

    Args:
        k: [B, H, T, D], changed in place; strided over B, H and T.
        shift: [B] integer positions, of either sign.
        inv_freq: [R / 2] fp32, radians per position, R <= D; the model's own.

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
