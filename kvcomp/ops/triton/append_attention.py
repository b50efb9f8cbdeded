"""append_attention in Triton: decode_attention's split KV, for the m queries of a sequence at once.

Grid (KV heads x tiles of rows, B, splits). The m x G queries of a KV head are the rows of a tile,
query by query, up to BLOCK_G of them: each K and V row is read once for them. Which of the newest
tokens a row sees is a bit of its word: of `tail`, or of 2^(i + 1) - 1 for query i. Everything else,
the cuts into splits and their merge too, is decode_attention's. Bytes: 2 T D elements per KV head
and tile, 4 T / page_size of page ids, 4 (D + 1) per row and split written and read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops._splits import MAX_SPLITS, MIN_SPLIT, num_multiprocessors, plan_splits
from kvcomp.ops.triton import COMPILE, LOG2E, dot, on_its_device
from kvcomp.ops.triton.decode_attention import (
    GROWING,
    PROGRAMS_PER_SM,
    config,
    merge_splits_kernel,
    refuse_codes,
)


@triton.jit(do_not_specialize=[*GROWING, "stride_logits_m", "num_queries"])
def append_attention_kernel(
    q,
    k,
    v,
    seq_lens,
    q_lens,  # None: all m
    tail,  # None: causal
    page_ids,  # None: dense
    logits,  # None: not wanted
    out,  # [B, m, Hq, splits, D]
    lse,  # [B, m, Hq, splits]
    scale,
    stride_q_b,
    stride_q_m,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_v_b,
    stride_v_h,
    stride_v_t,
    stride_tail_b,
    stride_ids_b,
    stride_ids_h,
    stride_logits_b,
    stride_logits_m,
    stride_logits_h,
    num_queries,  # m
    num_slots,  # T
    num_positions,  # T, or listed pages x PAGE_SIZE
    split_size,  # tokens, a multiple of BLOCK_N and of MIN_PART
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_PART: tl.constexpr,
):
    i_tile, i_b, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    tiles = tl.cdiv(num_queries * G, BLOCK_G)
    num_heads = tl.num_programs(0) // tiles * G
    i_kv = (i_tile // tiles).to(tl.int64)
    o_g = i_tile % tiles * BLOCK_G + tl.arange(0, BLOCK_G)  # rows, m-major
    o_m = o_g // G
    o_h = i_kv * G + o_g % G  # query heads
    o_d = tl.arange(0, BLOCK_D)
    m_g = o_m < num_queries
    m_d = o_d < D

    b_asked = tl.load(seq_lens + i_b)
    b_len = tl.minimum(b_asked, num_positions)
    b_count = num_queries if q_lens is None else tl.load(q_lens + i_b)
    i_new = b_asked - b_count  # the first new token
    m_q = o_m < b_count  # the others attend to nothing
    if tail is None:
        b_tail = (tl.full([BLOCK_G], 2, tl.int64) << tl.minimum(o_m, 62)) - 1
        b_tail = tl.where(o_m < 63, b_tail, -1)
    else:
        b_tail = tl.load(tail + i_b * stride_tail_b + o_m, mask=m_g, other=0)
    # Equal parts of what this sequence has, whatever there is room for; at most split_size.
    part = tl.cdiv(tl.cdiv(b_len, num_splits), BLOCK_N) * BLOCK_N
    part = tl.minimum(tl.maximum(part, MIN_PART), split_size)
    i_start = i_split * part
    i_end = tl.minimum(i_start + part, b_len)

    p_q = q + i_b * stride_q_b + o_m[None, :].to(tl.int64) * stride_q_m
    p_q += o_h[None, :] * stride_q_h + o_d[:, None]
    b_q = tl.load(p_q, mask=m_d[:, None] & m_g[None, :], other=0.0)  # [BLOCK_D, BLOCK_G]
    p_k = k + i_b * stride_k_b + i_kv * stride_k_h + o_d[None, :]
    p_v = v + i_b * stride_v_b + i_kv * stride_v_h + o_d[:, None]

    b_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_sums = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)  # summed over tokens once, at the end
    b_out = tl.zeros([BLOCK_D, BLOCK_G], tl.float32)
    for i_n in range(i_start, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_len = o_n < b_len
        if page_ids is None:
            b_slot = o_n.to(tl.int64)
            m_n = m_len
        else:
            # A page that holds whole blocks needs one id per block, smaller ones one per token.
            o_page = i_n // PAGE_SIZE if PAGE_SIZE % BLOCK_N == 0 else o_n // PAGE_SIZE
            p_ids = page_ids + i_b * stride_ids_b + i_kv * stride_ids_h + o_page
            b_page = tl.load(p_ids, mask=o_page * PAGE_SIZE < b_len, other=-1).to(tl.int64)
            b_slot = b_page * PAGE_SIZE + o_n % PAGE_SIZE
            m_n = m_len & (b_slot >= 0) & (b_slot < num_slots)
        m_nd = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + b_slot[:, None] * stride_k_t, mask=m_nd, other=0.0)
        b_logits = dot(b_k, b_q, tl.zeros([BLOCK_N, BLOCK_G], tl.float32)) * scale
        o_bit = tl.minimum(tl.maximum(o_n - i_new, 0), 63).to(tl.int64)
        m_seen = (o_n < i_new)[:, None] | ((b_tail[None, :] >> o_bit[:, None]) & 1 == 1)
        m_seen = m_seen & m_n[:, None] & m_q[None, :]
        b_logits = tl.where(m_seen, b_logits, float("-inf"))
        if page_ids is not None:  # an id out of range reads nothing and poisons the row
            m_wild = m_len & ((b_page < -1) | (b_slot >= num_slots))
            b_logits = tl.where(m_wild[:, None], float("nan"), b_logits)
        if logits is not None:
            p_logits = logits + i_b * stride_logits_b + o_m[None, :] * stride_logits_m
            p_logits += o_h[None, :] * stride_logits_h
            b_stored = b_logits
            if logits.dtype.element_ty == tl.float16:  # finite logits stay so
                m_finite = tl.abs(b_logits) < float("inf")
                b_stored = tl.where(m_finite, tl.clamp(b_logits, -65504.0, 65504.0), b_logits)
            b_stored = b_stored.to(logits.dtype.element_ty)
            tl.store(p_logits + o_n[:, None], b_stored, mask=m_len[:, None] & m_g[None, :])

        b_new = tl.maximum(b_max, tl.max(b_logits, 0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay = tl.exp2((b_max - b_base) * LOG2E)
        b_probs = tl.exp2((b_logits - b_base[None, :]) * LOG2E)
        b_sums = b_sums * b_decay[None, :] + b_probs
        m_dn = m_d[:, None] & m_n[None, :]
        b_v = tl.load(p_v + b_slot[None, :] * stride_v_t, mask=m_dn, other=0.0)
        b_out = dot(b_v, b_probs.to(b_v.dtype), b_out * b_decay[None, :])
        b_max = b_new

    b_sum = tl.sum(b_sums, 0)
    # Lengths that cannot be poison.
    m_wrong = (b_asked < 0) | (b_asked > num_positions) | (i_new < 0)
    m_wrong = m_wrong | (b_count < 0) | (b_count > num_queries)
    b_sum = tl.where(m_wrong, float("nan"), b_sum)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing attended: b_out is 0
    b_lse = b_max + tl.log(b_sum)  # -inf where nothing was attended
    b_out = b_out / b_sum[None, :]
    o_row = ((i_b * num_queries + o_m) * num_heads + o_h) * num_splits + i_split
    tl.store(lse + o_row, b_lse, mask=m_g)
    p_out = out + o_row[None, :] * D + o_d[:, None]
    # The output of an empty split is never read, so not written; that of an empty row is.
    m_out = m_g & (tl.where(num_splits > 1, b_lse, 0.0) != float("-inf"))
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d[:, None] & m_out[None, :])


@on_its_device
def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    tail: Tensor | None,
    page_ids: Tensor | None,
    page_size: int,
    scale: float,
    logits: Tensor | None,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    refuse_codes("append_attention", words)
    batch, count, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[1:3]
    group = num_heads // num_kv_heads
    num_positions = num_slots if page_ids is None else page_ids.shape[2] * page_size
    block_d = triton.next_power_of_2(head_dim)
    meta = config(head_dim, q.dtype, count * group, page_ids is not None)
    if q.dtype == torch.float32:  # more rows than a group has
        most = max(4, min(32, 2048 // block_d))
        meta = meta | {"BLOCK_G": min(triton.next_power_of_2(count * group), most)}
    programs = num_kv_heads * -(-count * group // meta["BLOCK_G"])
    num_splits, split_size = plan_splits(
        batch * programs,
        max(1, -(-num_positions // MIN_SPLIT)),
        num_multiprocessors(q.device) * PROGRAMS_PER_SM,
    )

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, count, num_heads, dtype=torch.float32)
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_out = lse.new_empty(batch, count, num_heads, num_splits, head_dim)
        partial_lse = lse.new_empty(batch, count, num_heads, num_splits)
    ids_strides = (0, 0) if page_ids is None else page_ids.stride()[:2]
    if page_ids is not None and page_ids.shape[1] == 1:
        ids_strides = ids_strides[0], 0
    append_attention_kernel[(programs, batch, num_splits)](
        q,
        k,
        v,
        seq_lens,
        q_lens,
        tail,
        page_ids,
        logits,
        partial_out,
        partial_lse,
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if tail is None else tail.stride(0),
        *ids_strides,
        *((0, 0, 0) if logits is None else logits.stride()[:3]),
        count,
        num_slots,
        num_positions,
        split_size,
        G=group,
        D=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_D=block_d,
        MIN_PART=MIN_SPLIT,
        **meta,
        **COMPILE,
    )
    if num_splits > 1:
        merge_splits_kernel[(batch * count * num_heads,)](
            partial_out,
            partial_lse,
            out,
            lse,
            num_splits,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_S=MAX_SPLITS,
            CHUNK=8,
            num_warps=4,
            **COMPILE,
        )
    return out, lse
