"""latent_attention in Triton: flash decoding with split tokens, then a merge of the splits.

Grid (tiles of query heads, B, splits). One program takes one split of the tokens and BLOCK_H of the
heads, which all share one row a token: S = q rowsᵀ [BLOCK_H, BLOCK_N], O = P V [BLOCK_H, Dv]. The
value columns of a row are read once and serve both products; the columns behind them only the
first. The tiles of heads of one split read the same rows one after the other, from L2. Bytes: T D
elements per tile of heads, 4 T / page_size of page ids, 4 (Dv + 1) per query head and split written
and read again by the merge; with logits 4 T per query head, or 2 T in fp16.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops._splits import MAX_SPLITS, MIN_SPLIT, num_multiprocessors, plan_splits
from kvcomp.ops.triton import COMPILE, LOG2E, dot, on_its_device
from kvcomp.ops.triton._tile import merge_splits_kernel

# These grow while a sequence is decoded: no second compilation at a multiple of 16.
GROWING = ["num_slots", "num_positions", "split_size", "stride_ids_b"]
GROWING += ["stride_logits_b", "stride_logits_h"]


@cache
def config(dim: int, dtype: torch.dtype, heads: int) -> dict[str, int]:
    """Tiles that fit the 99 KB of shared memory that every architecture since Ampere has."""
    if dtype == torch.float32:  # full-precision products run on the CUDA cores: tests, small jobs
        return {"BLOCK_H": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    if dim > 640:
        return {"BLOCK_H": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    block_h = 16 if heads <= 16 else 32
    return {"BLOCK_H": block_h, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=GROWING)
def latent_attention_kernel(
    q,
    latents,
    seq_lens,
    page_ids,  # None: dense
    logits,  # None: not wanted
    out,  # [B, Hq, splits, Dv]
    lse,  # [B, Hq, splits]
    scale,
    stride_q_b,
    stride_q_h,
    stride_rows_b,
    stride_rows_t,
    stride_ids_b,
    stride_logits_b,
    stride_logits_h,
    num_heads,
    num_slots,  # T
    num_positions,  # T, or listed pages x PAGE_SIZE
    split_size,  # tokens, a multiple of BLOCK_N and of MIN_PART
    DV: tl.constexpr,
    R: tl.constexpr,  # columns behind the value
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MIN_PART: tl.constexpr,
):
    i_tile, i_b, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    o_h = (i_tile * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    m_h = o_h < num_heads
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < DV
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R

    b_asked = tl.load(seq_lens + i_b)
    b_len = tl.minimum(b_asked, num_positions)
    # Equal parts of what this row has, whatever there is room for; at most split_size.
    part = tl.cdiv(tl.cdiv(b_len, num_splits), BLOCK_N) * BLOCK_N
    part = tl.minimum(tl.maximum(part, MIN_PART), split_size)
    i_start = i_split * part
    i_end = tl.minimum(i_start + part, b_len)

    p_q = q + i_b * stride_q_b + o_h[:, None] * stride_q_h
    b_q = tl.load(p_q + o_v[None, :], mask=m_h[:, None] & m_v[None, :], other=0.0)
    if R > 0:
        b_qr = tl.load(p_q + DV + o_r[None, :], mask=m_h[:, None] & m_r[None, :], other=0.0)
    p_rows = latents + i_b * stride_rows_b

    b_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    b_out = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    for i_n in range(i_start, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_len = o_n < b_len
        if page_ids is None:
            b_slot = o_n.to(tl.int64)
            m_n = m_len
        else:
            # A page that holds whole blocks needs one id per block, smaller ones one per token.
            o_page = i_n // PAGE_SIZE if PAGE_SIZE % BLOCK_N == 0 else o_n // PAGE_SIZE
            p_ids = page_ids + i_b * stride_ids_b + o_page
            b_page = tl.load(p_ids, mask=o_page * PAGE_SIZE < b_len, other=-1).to(tl.int64)
            b_slot = b_page * PAGE_SIZE + o_n % PAGE_SIZE
            m_n = m_len & (b_slot >= 0) & (b_slot < num_slots)
        p_row = p_rows + b_slot[:, None] * stride_rows_t
        b_v = tl.load(p_row + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0.0)
        b_logits = dot(b_q, tl.trans(b_v), tl.zeros([BLOCK_H, BLOCK_N], tl.float32))
        if R > 0:
            b_r = tl.load(p_row + DV + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
            b_logits = dot(b_qr, tl.trans(b_r), b_logits)
        b_logits = tl.where(m_n[None, :], b_logits * scale, float("-inf"))
        if page_ids is not None:  # an id out of range reads nothing and poisons the row
            m_wild = m_len & ((b_page < -1) | (b_slot >= num_slots))
            b_logits = tl.where(m_wild[None, :], float("nan"), b_logits)
        if logits is not None:
            p_logits = logits + i_b * stride_logits_b + o_h[:, None] * stride_logits_h
            b_stored = b_logits
            if logits.dtype.element_ty == tl.float16:  # finite logits stay so
                m_finite = tl.abs(b_logits) < float("inf")
                b_stored = tl.where(m_finite, tl.clamp(b_logits, -65504.0, 65504.0), b_logits)
            b_stored = b_stored.to(logits.dtype.element_ty)
            tl.store(p_logits + o_n[None, :], b_stored, mask=m_h[:, None] & m_len[None, :])

        b_new = tl.maximum(b_max, tl.max(b_logits, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay = tl.exp2((b_max - b_base) * LOG2E)
        b_probs = tl.exp2((b_logits - b_base[:, None]) * LOG2E)
        b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
        b_out = dot(b_probs.to(b_v.dtype), b_v, b_out * b_decay[:, None])
        b_max = b_new

    m_wrong = (b_asked < 0) | (b_asked > num_positions)  # a length that cannot be: poison
    b_sum = tl.where(m_wrong, float("nan"), b_sum)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing attended: b_out is 0
    b_lse = b_max + tl.log(b_sum)  # -inf where nothing was attended
    b_out = b_out / b_sum[:, None]
    o_row = (i_b * num_heads + o_h) * num_splits + i_split
    tl.store(lse + o_row, b_lse, mask=m_h)
    # The output of an empty split is never read, so not written; that of an empty row is.
    m_out = m_h & (tl.where(num_splits > 1, b_lse, 0.0) != float("-inf"))
    p_out = out + o_row[:, None] * DV + o_v[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out[:, None] & m_v[None, :])


@on_its_device
def launch(
    q: Tensor,
    latents: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_size: int,
    value_dim: int,
    scale: float,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, num_heads, dim = q.shape
    num_slots = latents.shape[1]
    num_positions = num_slots if page_ids is None else page_ids.shape[2] * page_size
    meta = config(dim, q.dtype, num_heads)
    block_v = triton.next_power_of_2(value_dim)
    programs = -(-num_heads // meta["BLOCK_H"])
    num_splits, split_size = plan_splits(
        batch * programs,
        max(1, -(-num_positions // MIN_SPLIT)),
        num_multiprocessors(q.device),
    )

    out = q.new_empty(batch, num_heads, value_dim)
    lse = q.new_empty(batch, num_heads, dtype=torch.float32)
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_out = lse.new_empty(batch, num_heads, num_splits, value_dim)
        partial_lse = lse.new_empty(batch, num_heads, num_splits)
    latent_attention_kernel[(programs, batch, num_splits)](
        q,
        latents,
        seq_lens,
        page_ids,
        logits,
        partial_out,
        partial_lse,
        scale,
        *q.stride()[:2],
        *latents.stride()[:2],
        0 if page_ids is None else page_ids.stride(0),
        *((0, 0) if logits is None else logits.stride()[:2]),
        num_heads,
        num_slots,
        num_positions,
        split_size,
        DV=value_dim,
        R=dim - value_dim,
        PAGE_SIZE=page_size,
        BLOCK_V=block_v,
        BLOCK_R=max(16, triton.next_power_of_2(dim - value_dim)),
        MIN_PART=MIN_SPLIT,
        **meta,
        **COMPILE,
    )
    if num_splits > 1:
        merge_splits_kernel[(batch * num_heads,)](
            partial_out,
            partial_lse,
            out,
            lse,
            num_splits,
            D=value_dim,
            BLOCK_D=block_v,
            BLOCK_S=MAX_SPLITS,
            CHUNK=8,
            num_warps=4,
            **COMPILE,
        )
    return out, lse
