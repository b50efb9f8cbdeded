"""quantize_rows: K and V of new tokens in eight bits, every row by itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops.hadamard import reference as turned

WORD_ROOM = 16  # bytes of a word in a row of a pool, which stays aligned


def quantize_rows(
    k: Tensor, v: Tensor, k_codes: Tensor, v_codes: Tensor, words: Tensor, *, turn: bool = False
) -> None:
    """Write each row as codes in [-127, 127] times a scale of its own.

    The scale is the row's largest magnitude over 127, rounded to fp16, and the codes are made with
    the rounded scale. A row of zeros has scale 0. A row with NaN or an infinity, or with numbers
    beyond 127 * 65504, has scale NaN, so that whatever attends to it is NaN, as without codes.

    Args:
        k, v: [B, H, T, D] of one dtype: fp32, fp16 or bf16; any strides but that of D, which is a
            multiple of 16 and at most 512.
        k_codes, v_codes: [B, H, T, D] int8, written.
        words: [B, H, T] int32, written: the fp16 scale of K in the low half, that of V in the high
            half.
        turn: K times the Hadamard matrix first, see `hadamard`; its queries must be turned, too.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; `turn` where D is no power of
            two.

    Source:
        a scale per token and head: KVQuant (2401.18079), section 3; Hadamard: QuaRot (2404.00456).
    """
    _op(k, v, k_codes, v_codes, words, turn)


def dequantized(
    k_codes: Tensor, v_codes: Tensor, words: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The rows that codes [..., D] and words [...] stand for; turned keys stay turned."""
    k_scale, v_scale = words.short(), (words >> 16).short()  # the bits of fp16

    def rows(codes: Tensor, scale: Tensor) -> Tensor:
        return codes.to(dtype) * scale.view(torch.float16)[..., None].to(dtype)

    return rows(k_codes, k_scale), rows(v_codes, v_scale)


def packed(k_codes: Tensor, v_codes: Tensor, words: Tensor) -> Tensor:
    """Codes [..., D] and words [...] as rows of a pool in host memory, [..., 2 D + 16] int8."""
    word = words[..., None].contiguous().view(torch.int8)
    return torch.cat([k_codes, v_codes, word, word.new_zeros(*words.shape, WORD_ROOM - 4)], -1)


def unpacked(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and words of such rows."""
    dim = (rows.shape[-1] - WORD_ROOM) // 2
    k_codes, v_codes, word, _ = rows.split([dim, dim, 4, WORD_ROOM - 4], -1)
    return k_codes, v_codes, word.contiguous().view(torch.int32)[..., 0]


def reference(k, v, k_codes, v_codes, words, turn):
    k, v = k.float(), v.float()  # codes are defined by fp32 arithmetic
    halves = []
    for x, codes in ((turned(k) if turn else k, k_codes), (v, v_codes)):
        scale = (x.abs().amax(-1) / 127).half()
        scale = scale.masked_fill(~scale.isfinite(), torch.nan)
        inverse = (1 / scale.float()).nan_to_num(posinf=0.0)[..., None]
        codes.copy_((x * inverse).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127))
        codes.masked_fill_(scale.isnan()[..., None], 0)
        halves.append(scale.view(torch.int16).int())
    words.copy_(halves[1] << 16 | halves[0] & 0xFFFF)


def fake(k, v, k_codes, v_codes, words, turn):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(k, v, k_codes, v_codes, words, turn):
        extension.quantize_rows(backend, k, v, k_codes, v_codes, words, turn, raw_stream(k))

    return run


_op = bind(
    "quantize_rows",
    "(Tensor k, Tensor v, Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) words, bool turn)"
    " -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
