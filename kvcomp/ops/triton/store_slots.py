"""store_slots in Triton: K and V of new tokens into the pages of a pool.

Grid (tokens, tiles of heads). One program copies a token's rows of BLOCK_H heads, K and then V.
Bytes: the rows, read and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, on_its_device

BLOCK_ELEMENTS = 4096  # of a program, K and V each


@triton.jit(do_not_specialize=["num_slots"])
def store_slots_kernel(
    k,  # [N, H, D]
    v,  # [N, H, DV]
    k_pool,  # [pages, H, P, D]
    v_pool,  # [pages, H, P, DV]
    slot_mapping,  # [N]
    stride_k_n,
    stride_k_h,
    stride_v_n,
    stride_v_h,
    stride_k_pool_p,
    stride_k_pool_h,
    stride_k_pool_t,
    stride_v_pool_p,
    stride_v_pool_h,
    stride_v_pool_t,
    num_slots,  # pages * P
    num_heads,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    i_slot = tl.load(slot_mapping + i_n)
    m_h = (o_h < num_heads) & (i_slot >= 0) & (i_slot < num_slots)
    i_page, i_place = i_slot // PAGE_SIZE, i_slot % PAGE_SIZE

    m_k = m_h & (o_d < D)
    b_k = tl.load(k + i_n * stride_k_n + o_h * stride_k_h + o_d, mask=m_k)
    p_k = k_pool + i_page * stride_k_pool_p + i_place * stride_k_pool_t
    tl.store(p_k + o_h * stride_k_pool_h + o_d, b_k, mask=m_k)
    if DV > 0:
        m_v = m_h & (o_d < DV)
        b_v = tl.load(v + i_n * stride_v_n + o_h * stride_v_h + o_d, mask=m_v)
        p_v = v_pool + i_page * stride_v_pool_p + i_place * stride_v_pool_t
        tl.store(p_v + o_h * stride_v_pool_h + o_d, b_v, mask=m_v)


@on_its_device
def launch(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_heads, dim = k.shape
    pages, _, page_size, _ = k_pool.shape
    if num_tokens == 0:
        return
    block_d = triton.next_power_of_2(max(dim, v.shape[-1]))
    block_h = min(triton.next_power_of_2(num_heads), max(1, BLOCK_ELEMENTS // block_d))
    store_slots_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        k,
        v,
        k_pool,
        v_pool,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_pool.stride()[:3],
        *v_pool.stride()[:3],
        pages * page_size,
        num_heads,
        PAGE_SIZE=page_size,
        D=dim,
        DV=v.shape[-1],
        BLOCK_D=block_d,
        BLOCK_H=block_h,
        num_warps=4,
        **COMPILE,
    )
