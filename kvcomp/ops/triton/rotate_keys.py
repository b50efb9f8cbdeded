"""rotate_keys in Triton: cached keys rotated by one angle per row and frequency, in place.

Grid (tiles of tokens, H, B). One program rotates BLOCK_T tokens of a head: both halves of the
rotated elements in one go, with the row's cos and sin kept for all of its tokens. Bytes: R elements
of each key read and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, on_its_device

BLOCK_ELEMENTS = 2048  # of each half of a program's tile [BLOCK_T, BLOCK_R]: two 16-byte loads


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_keys_kernel(
    k,  # [B, H, T, D]
    cos,  # [B, R / 2]
    sin,  # [B, R / 2]
    stride_b,
    stride_h,
    stride_t,
    num_tokens,  # T
    HALF: tl.constexpr,  # R / 2
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of HALF
):
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < HALF
    m_k = (o_t < num_tokens)[:, None] & m_r[None, :]
    p_k = k + i_b * stride_b + i_h.to(tl.int64) * stride_h
    p_k += o_t[:, None] * stride_t + o_r[None, :]

    b_cos = tl.load(cos + i_b * HALF + o_r, mask=m_r, other=0.0)[None, :]
    b_sin = tl.load(sin + i_b * HALF + o_r, mask=m_r, other=0.0)[None, :]
    b_first = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
    b_second = tl.load(p_k + HALF, mask=m_k, other=0.0).to(tl.float32)
    b_turned = b_first * b_cos - b_second * b_sin
    tl.store(p_k, b_turned.to(k.dtype.element_ty), mask=m_k)
    b_turned = b_second * b_cos + b_first * b_sin
    tl.store(p_k + HALF, b_turned.to(k.dtype.element_ty), mask=m_k)


@on_its_device
def launch(k: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, num_heads, num_tokens, _ = k.shape
    half = cos.shape[-1]
    block_r = triton.next_power_of_2(half)
    block_t = max(1, BLOCK_ELEMENTS // block_r)
    rotate_keys_kernel[(triton.cdiv(num_tokens, block_t), num_heads, batch)](
        k,
        cos,
        sin,
        *k.stride()[:3],
        num_tokens,
        HALF=half,
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        num_warps=4,
        **COMPILE,
    )
