"""query_similarity in Triton: the mean cosine of a row's heads with those of the step before.

Grid (B). One program walks the heads of a row, BLOCK_H at a time, and leaves each tile of queries
behind as the previous ones. Bytes: Hq D elements of both read, and written once; the time is
latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, on_its_device

BLOCK_ELEMENTS = 4096  # of a tile [BLOCK_H, BLOCK_D]: 32 heads of 128 at once


@triton.jit
def query_similarity_kernel(
    q,  # [B, Hq, D]
    previous,  # [B, Hq, D]
    similarity,  # [B]
    stride_b,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    b_known = tl.zeros([BLOCK_H], tl.int32)  # whether any previous query is not 0
    for i_h in range(0, H, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)
        m_hd = (o_h < H)[:, None] & (o_d < D)[None, :]
        p_q = q + i_b * stride_b + o_h[:, None].to(tl.int64) * stride_h + o_d[None, :]
        p_previous = previous + (i_b * H + o_h[:, None]) * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_hd, other=0.0)
        b_previous = tl.load(p_previous, mask=m_hd, other=0.0).to(tl.float32)
        tl.store(p_previous, b_q, mask=m_hd)
        b_q = b_q.to(tl.float32)
        b_norms = tl.sqrt(tl.sum(b_q * b_q, 1)) * tl.sqrt(tl.sum(b_previous * b_previous, 1))
        b_dots = tl.sum(b_q * b_previous, 1)
        b_cosines = b_dots / tl.where(b_norms > 0, b_norms, 1.0)
        b_sum += tl.where(b_norms > 0, tl.clamp(b_cosines, -1.0, 1.0), 0.0)
        b_known |= tl.max((b_previous != 0).to(tl.int32), 1)
    b_mean = tl.sum(b_sum, 0) / H
    tl.store(similarity + i_b, tl.where(tl.max(b_known, 0) > 0, b_mean, float("-inf")))


@on_its_device
def launch(q: Tensor, previous: Tensor) -> Tensor:
    batch, heads, dim = q.shape
    similarity = q.new_empty(batch, dtype=torch.float32)
    block_d = triton.next_power_of_2(dim)
    block_h = min(triton.next_power_of_2(heads), max(1, BLOCK_ELEMENTS // block_d))
    query_similarity_kernel[(batch,)](
        q,
        previous,
        similarity,
        *q.stride()[:2],
        H=heads,
        D=dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
        **COMPILE,
    )
    return similarity
