"""unit_scores in Triton: logits of tiles of units, then their softmax, averaged over the group.

Both grids are (tiles of units, KV heads, B). The first kernel scores BLOCK_U units for all heads of
a group at once, so each centroid is read once, and leaves the logits and their lse over the tile.
The second merges a head's lses, few enough to be read by every program, and sums the probabilities
over the group. Tiles past a row's units, and rows that are not active, read nothing. Bytes: U D
elements per KV head, 8 U per query head written and read again, 4 U per KV head written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, LOG2E, dot, on_its_device

BLOCK_D = 128  # elements of a centroid at a time
BLOCK_PROBS = 512  # units of a program of the second kernel: four per thread


@triton.jit(do_not_specialize=["stride_starts_b", "stride_starts_h", "num_units"])
def unit_logits_kernel(
    q,  # [B, Hq, D]
    centroids,  # [B, Hkv, U, D]
    starts,  # [B, Hkv, U + 1]
    num_indexed,  # [B]
    active,  # [B]
    logits,  # [B, Hq, U]
    lse,  # [B, Hq, tiles]
    scale,
    stride_q_b,
    stride_q_h,
    stride_c_b,
    stride_c_h,
    stride_starts_b,
    stride_starts_h,
    num_units,  # U
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    i_u, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b_units = tl.minimum(tl.load(num_indexed + i_b), num_units)
    if (tl.load(active + i_b) == 0) | (i_u * BLOCK_U >= b_units):
        return
    i_kv = i_h.to(tl.int64)
    o_u = i_u * BLOCK_U + tl.arange(0, BLOCK_U)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < G
    p_starts = starts + i_b * stride_starts_b + i_kv * stride_starts_h + o_u
    m_u = o_u < b_units
    m_full = tl.load(p_starts + 1, mask=m_u, other=0) > tl.load(p_starts, mask=m_u, other=0)

    p_q = q + i_b * stride_q_b + (i_kv * G + o_g)[None, :] * stride_q_h
    p_c = centroids + i_b * stride_c_b + i_kv * stride_c_h + o_u[:, None].to(tl.int64) * D
    b_logits = tl.zeros([BLOCK_U, BLOCK_G], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_c = tl.load(p_c + o_d[None, :], mask=m_u[:, None] & m_d[None, :], other=0.0)
        b_q = tl.load(p_q + o_d[:, None], mask=m_d[:, None] & m_g[None, :], other=0.0)
        b_logits = dot(b_c, b_q, b_logits)
    b_logits = tl.where(m_full[:, None], b_logits * scale, float("-inf"))

    b_max = tl.max(b_logits, 0)
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2((b_logits - b_base[None, :]) * LOG2E), 0)
    b_lse = b_max + tl.log(tl.where(b_sum == 0.0, 1.0, b_sum))  # -inf where all are empty
    o_row = (i_b * tl.num_programs(1) + i_kv) * G + o_g
    tl.store(lse + o_row * tl.num_programs(0) + i_u, b_lse, mask=m_g)
    p_logits = logits + o_row[None, :] * num_units + o_u[:, None]
    tl.store(p_logits, b_logits, mask=m_u[:, None] & m_g[None, :])


@triton.jit(do_not_specialize=["num_units", "num_tiles"])
def unit_probs_kernel(
    logits,  # [B, Hq, U]
    lse,  # [B, Hq, tiles]
    num_indexed,  # [B]
    active,  # [B]
    scores,  # [B, Hkv, U]
    num_units,  # U
    num_tiles,
    G: tl.constexpr,
    BLOCK_U: tl.constexpr,  # of the tiles
    BLOCK_TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_p, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_tile = tl.arange(0, BLOCK_TILES)
    i_row = i_b * tl.num_programs(1) + i_h
    b_units = tl.minimum(tl.load(num_indexed + i_b), num_units)
    b_units = tl.where(tl.load(active + i_b) == 0, 0, b_units)
    b_probs = tl.zeros([BLOCK_P], tl.float32)
    if i_p * BLOCK_P < b_units:
        for i_g in tl.range(G, loop_unroll_factor=4):
            i_q = i_row * G + i_g
            p_lse = lse + i_q * num_tiles + o_tile
            b_lse = tl.load(p_lse, mask=o_tile * BLOCK_U < b_units, other=float("-inf"))
            b_max = tl.max(b_lse, 0)
            b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
            b_sum = tl.sum(tl.exp2((b_lse - b_max) * LOG2E), 0)
            p_logits = logits + i_q * num_units + o_p
            b_logits = tl.load(p_logits, mask=o_p < b_units, other=float("-inf"))
            b_part = tl.exp2((b_logits - b_max) * LOG2E)
            b_probs += b_part / tl.where(b_sum == 0.0, 1.0, b_sum)  # 0: nothing but empty units
    tl.store(scores + i_row * num_units + o_p, b_probs / G, mask=o_p < num_units)


@on_its_device
def launch(
    q: Tensor,
    centroids: Tensor,
    starts: Tensor,
    num_indexed: Tensor,
    active: Tensor,
    scale: float,
) -> Tensor:
    batch, heads, units, dim = centroids.shape
    group = q.shape[1] // heads
    block_g, block_u = max(16, triton.next_power_of_2(group)), 64  # 16: what tensor cores take
    if q.dtype == torch.float32:
        block_g, block_u = triton.next_power_of_2(group), 16
    tiles = triton.cdiv(units, block_u)
    scores = q.new_empty(batch, heads, units, dtype=torch.float32)
    logits = scores.new_empty(batch, heads * group, units)
    lse = scores.new_empty(batch, heads * group, tiles)
    unit_logits_kernel[(tiles, heads, batch)](
        q,
        centroids,
        starts,
        num_indexed,
        active,
        logits,
        lse,
        scale,
        *q.stride()[:2],
        *centroids.stride()[:2],
        *starts.stride()[:2],
        units,
        G=group,
        D=dim,
        BLOCK_G=block_g,
        BLOCK_D=min(triton.next_power_of_2(dim), BLOCK_D),
        BLOCK_U=block_u,
        num_warps=4,
        **COMPILE,
    )
    unit_probs_kernel[(triton.cdiv(units, BLOCK_PROBS), heads, batch)](
        logits,
        lse,
        num_indexed,
        active,
        scores,
        units,
        tiles,
        G=group,
        BLOCK_U=block_u,
        BLOCK_TILES=triton.next_power_of_2(max(tiles, 1)),
        BLOCK_P=BLOCK_PROBS,
        num_warps=4,
        **COMPILE,
    )
    return scores
