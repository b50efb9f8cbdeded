"""quantize_rows in Triton: K and V of new tokens as codes, every row with a scale of its own.

Grid (tiles of tokens, H, B). One program makes the codes of BLOCK_N tokens of a head, K and then V,
and their words. Bytes: the rows, read once, and half of that (of fp32, a quarter) written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, on_its_device
from kvcomp.ops.triton.hadamard import BLOCK_ELEMENTS, factor_of, turned

# Codes are defined by fp32 arithmetic, operation by operation: no product is fused with a sum.
EXACT = COMPILE | {"enable_fp_fusion": False}


@triton.jit
def quantized(b_x):
    """Codes of rows b_x [N, D], and the bits of their scales [N] as int32."""
    b_top = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # magnitudes order as their bits
    b_top = b_top.to(tl.float32, bitcast=True)
    b_scale = tl.div_rn(b_top, 127.0).to(tl.float16).to(tl.float32)
    m_finite = b_scale < float("inf")  # neither is NaN
    b_one = tl.where(m_finite & (b_scale > 0.0), b_scale, float("inf"))
    b_codes = b_x * tl.div_rn(1.0, b_one)[:, None]  # 0 where there is no scale
    b_codes = tl.clamp(tl.where(m_finite[:, None], b_codes, 0.0), -127.0, 127.0)
    b_codes = (b_codes + 12582912.0) - 12582912.0  # to the nearest, ties to even
    b_bits = b_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return b_codes.to(tl.int8), tl.where(m_finite, b_bits, 0x7E00)


@triton.jit(do_not_specialize=["num_tokens"])
def quantize_rows_kernel(
    k,  # [B, H, T, D]
    v,
    k_codes,  # [B, H, T, D]
    v_codes,
    words,  # [B, H, T]
    factor,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_v_b,
    stride_v_h,
    stride_v_t,
    stride_k_codes_b,
    stride_k_codes_h,
    stride_k_codes_t,
    stride_v_codes_b,
    stride_v_codes_h,
    stride_v_codes_t,
    stride_words_b,
    stride_words_h,
    num_tokens,  # T
    TURN: tl.constexpr,
    D: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < num_tokens
    mask = m_n[:, None] & (o_d < D)[None, :]

    p_k = k + i_b * stride_k_b + i_h * stride_k_h + o_n[:, None] * stride_k_t + o_d[None, :]
    b_x = tl.load(p_k, mask=mask, other=0.0).to(tl.float32)
    if TURN:
        b_x = turned(b_x, factor, BLOCK_N, BLOCK_D, ROUNDS)
    b_codes, b_low = quantized(b_x)
    p_codes = k_codes + i_b * stride_k_codes_b + i_h * stride_k_codes_h
    tl.store(p_codes + o_n[:, None] * stride_k_codes_t + o_d[None, :], b_codes, mask=mask)

    p_v = v + i_b * stride_v_b + i_h * stride_v_h + o_n[:, None] * stride_v_t + o_d[None, :]
    b_codes, b_high = quantized(tl.load(p_v, mask=mask, other=0.0).to(tl.float32))
    p_codes = v_codes + i_b * stride_v_codes_b + i_h * stride_v_codes_h
    tl.store(p_codes + o_n[:, None] * stride_v_codes_t + o_d[None, :], b_codes, mask=mask)
    p_words = words + i_b * stride_words_b + i_h * stride_words_h
    tl.store(p_words + o_n, (b_high << 16) | b_low, mask=m_n)


@on_its_device
def launch(
    k: Tensor, v: Tensor, k_codes: Tensor, v_codes: Tensor, words: Tensor, turn: bool
) -> None:
    batch, num_heads, num_tokens, head_dim = k.shape
    if k.numel() == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    block_n = max(1, BLOCK_ELEMENTS // block_d)
    quantize_rows_kernel[(triton.cdiv(num_tokens, block_n), num_heads, batch)](
        k,
        v,
        k_codes,
        v_codes,
        words,
        factor_of(head_dim),
        *k.stride()[:3],
        *v.stride()[:3],
        *k_codes.stride()[:3],
        *v_codes.stride()[:3],
        *words.stride()[:2],
        num_tokens,
        TURN=turn,
        D=head_dim,
        ROUNDS=head_dim.bit_length() - 1,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=4,
        **EXACT,
    )
