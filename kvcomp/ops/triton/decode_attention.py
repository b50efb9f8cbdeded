"""decode_attention in Triton: flash decoding with split KV, then a merge of the splits.

Grid (KV heads x tiles of the group, B, splits). One program takes one split of the tokens of one KV
head and, together, the BLOCK_G query heads that share it, so each K and V row is read once. K and V
are the tall operands, S = K qᵀ [BLOCK_N, BLOCK_G] and Oᵀ = Vᵀ P [D, BLOCK_G]: tokens fill the rows
that tensor cores insist on, the group is their narrow side. Paged input differs only in where a
token's slot comes from. A program past the end of its row leaves the empty state. Bytes: 2 T D
elements per KV head, 4 T / page_size of page ids, 4 (D + 1) per query head and split written and
read again by the merge; with logits 4 T per query head, or 2 T in fp16.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops._splits import MAX_SPLITS, MIN_SPLIT, num_multiprocessors, plan_splits
from kvcomp.ops.triton import COMPILE, LOG2E, dot, on_its_device

PROGRAMS_PER_SM = 2  # what shared memory and registers allow on Hopper

# These grow while a sequence is decoded: no second compilation at a multiple of 16.
GROWING = ["num_slots", "num_positions", "split_size", "stride_ids_b", "stride_ids_h"]
GROWING += ["stride_logits_b", "stride_logits_h"]


@cache
def config(head_dim: int, dtype: torch.dtype, group: int, paged: bool) -> dict[str, int]:
    """Tiles and pipeline depth: 32 KiB of K and V a tile, three in flight, two programs per SM."""
    block_g = triton.next_power_of_2(group)
    if dtype == torch.float32:  # full-precision products run on the CUDA cores: tests, small jobs
        block_g, block_n, num_warps, num_stages = min(block_g, 4), 16, 4, 2
    elif head_dim <= 64:
        block_g, block_n, num_warps, num_stages = min(block_g, 32), 128, 4, 3
    elif head_dim <= 128:
        block_g, block_n, num_warps, num_stages = min(block_g, 32), 64, 4, 3
    else:
        block_g, block_n, num_warps, num_stages = min(block_g, 32), 32, 4, 3
    return {
        "BLOCK_G": block_g if dtype == torch.float32 else max(block_g, 16),  # 16: what wgmma takes
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages + 2 * paged,  # ids arrive two tiles ahead of K and V
    }


@triton.jit(do_not_specialize=GROWING)
def decode_attention_kernel(
    q,
    k,
    v,
    seq_lens,
    page_ids,  # None: dense
    logits,  # None: not wanted
    out,  # [B, Hq, splits, D]
    lse,  # [B, Hq, splits]
    scale,
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_v_b,
    stride_v_h,
    stride_v_t,
    stride_ids_b,
    stride_ids_h,
    stride_logits_b,
    stride_logits_h,
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
    i_head, i_b, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    i_kv = (i_head // tl.cdiv(G, BLOCK_G)).to(tl.int64)
    o_g = i_head % tl.cdiv(G, BLOCK_G) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_g = o_g < G
    m_d = o_d < D
    o_h = i_kv * G + o_g  # query heads

    b_asked = tl.load(seq_lens + i_b)
    b_len = tl.minimum(b_asked, num_positions)
    # Equal parts of what this row has, whatever there is room for; at most split_size.
    part = tl.cdiv(tl.cdiv(b_len, num_splits), BLOCK_N) * BLOCK_N
    part = tl.minimum(tl.maximum(part, MIN_PART), split_size)
    i_start = i_split * part
    i_end = tl.minimum(i_start + part, b_len)

    p_q = q + i_b * stride_q_b + o_h[None, :] * stride_q_h + o_d[:, None]
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
        b_logits = tl.where(m_n[:, None], b_logits, float("-inf"))
        if page_ids is not None:  # an id out of range reads nothing and poisons the row
            m_wild = m_len & ((b_page < -1) | (b_slot >= num_slots))
            b_logits = tl.where(m_wild[:, None], float("nan"), b_logits)
        if logits is not None:
            p_logits = logits + i_b * stride_logits_b + o_h[None, :] * stride_logits_h
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
    m_wrong = (b_asked < 0) | (b_asked > num_positions)  # a length that cannot be: poison
    b_sum = tl.where(m_wrong, float("nan"), b_sum)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing attended: b_out is 0
    b_lse = b_max + tl.log(b_sum)  # -inf where nothing was attended
    b_out = b_out / b_sum[None, :]
    num_heads = tl.num_programs(0) // tl.cdiv(G, BLOCK_G) * G
    o_row = (i_b * num_heads + o_h) * num_splits + i_split
    tl.store(lse + o_row, b_lse, mask=m_g)
    p_out = out + o_row[None, :] * D + o_d[:, None]
    # The output of an empty split is never read, so not written; that of an empty row is.
    m_out = m_g & (tl.where(num_splits > 1, b_lse, 0.0) != float("-inf"))
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d[:, None] & m_out[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(
    partial_out,  # [rows, splits, D] fp32
    partial_lse,  # [rows, splits]
    out,  # [rows, D]
    lse,  # [rows]
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_s = tl.arange(0, BLOCK_S)
    p_lse = partial_lse + i_row * num_splits
    b_lse = tl.load(p_lse + o_s, mask=o_s < num_splits, other=float("-inf"))
    b_max = tl.max(b_lse, 0)
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2((b_lse - b_base) * LOG2E), 0)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    for i_s in range(0, num_splits, CHUNK):
        o_c = i_s + tl.arange(0, CHUNK)
        b_part = tl.load(p_lse + o_c, mask=o_c < num_splits, other=float("-inf"))
        m_c = b_part != float("-inf")  # empty splits are not read
        p_part = partial_out + (i_row * num_splits + o_c[:, None]) * D + o_d[None, :]
        b_part_out = tl.load(p_part, mask=m_c[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.where(m_c, tl.exp2((b_part - b_base) * LOG2E), 0.0)
        b_out += tl.sum(b_part_out * b_weight[:, None], 0)
    tl.store(lse + i_row, b_max + tl.log(b_sum))  # -inf where all splits are empty
    tl.store(out + i_row * D + o_d, (b_out / b_sum).to(out.dtype.element_ty), mask=m_d)


def refuse_codes(op: str, words: Tensor | None) -> None:
    if words is not None:
        raise ValueError(
            f"kvcomp.{op}: argument 'words': expected None for Triton, whose kernels take no K and"
            " V in eight bits, got a tensor"
        )


@on_its_device
def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_size: int,
    scale: float,
    logits: Tensor | None,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    refuse_codes("decode_attention", words)
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[1:3]
    group = num_heads // num_kv_heads
    num_positions = num_slots if page_ids is None else page_ids.shape[2] * page_size
    meta = config(head_dim, q.dtype, group, page_ids is not None)
    block_d = triton.next_power_of_2(head_dim)
    programs = num_kv_heads * -(-group // meta["BLOCK_G"])
    num_splits, split_size = plan_splits(
        batch * programs,
        max(1, -(-num_positions // MIN_SPLIT)),
        num_multiprocessors(q.device) * PROGRAMS_PER_SM,
    )

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, num_heads, dtype=torch.float32)
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_out = lse.new_empty(batch, num_heads, num_splits, head_dim)
        partial_lse = lse.new_empty(batch, num_heads, num_splits)
    ids_strides = (0, 0) if page_ids is None else page_ids.stride()[:2]
    if page_ids is not None and page_ids.shape[1] == 1:
        ids_strides = ids_strides[0], 0
    decode_attention_kernel[(programs, batch, num_splits)](
        q,
        k,
        v,
        seq_lens,
        page_ids,
        logits,
        partial_out,
        partial_lse,
        scale,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        *ids_strides,
        *((0, 0) if logits is None else logits.stride()[:2]),
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
        merge_splits_kernel[(batch * num_heads,)](
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
