"""decode_attention in Triton: flash decoding with split KV, then a merge of the splits.

Grid (KV heads x tiles of the group, B, splits). One program takes one split of the tokens of one KV
head and, together, the BLOCK_G query heads that share it, so each K and V row is read once. Paged
input differs only in where a token's slot comes from. A program past the end of its row leaves the
empty state. Bytes: 2 T D elements per KV head, 4 T / page_size of page ids, 4 (D + 1) per query
head and split written and read again by the merge; with logits 4 T per query head, or 2 T in fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops._splits import MIN_SPLIT
from kvcomp.ops.decode_attention import NO_BOUND
from kvcomp.ops.triton import COMPILE, on_its_device
from kvcomp.ops.triton._tile import (
    GROWING,
    HEADROOM,
    Places,
    Splits,
    attend,
    config,
    in_integers,
    logits_of,
    slots_of,
    split_of,
    store_logits,
    store_state,
)


@triton.jit(do_not_specialize=GROWING)
def decode_attention_kernel(
    q,
    k,
    v,
    seq_lens,
    page_ids,  # None: dense
    words,  # None: no codes
    logits,  # None: not wanted
    out,  # [B, Hq, splits, D]
    lse,  # [B, Hq, splits]
    scale,
    softcap,  # None: no cap
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_v_b,
    stride_v_h,
    stride_v_t,
    stride_words_b,
    stride_words_h,
    stride_ids_b,
    stride_ids_h,
    stride_logits_b,
    stride_logits_h,
    num_slots,  # T
    page_pitch,  # slots from one page to the next
    num_positions,  # T, or listed pages x PAGE_SIZE, or fewer where no row is so long
    split_size,  # tokens, a multiple of BLOCK_N and of MIN_PART
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_PART: tl.constexpr,
):
    i_head, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_kv = (i_head // tl.cdiv(G, BLOCK_G)).to(tl.int64)
    o_g = i_head % tl.cdiv(G, BLOCK_G) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_g = o_g < G
    m_d = o_d < D
    m_v = o_v < DV
    o_h = i_kv * G + o_g  # query heads

    b_asked = tl.load(seq_lens + i_b)
    b_len = tl.minimum(b_asked, num_positions)
    i_start, i_end = split_of(b_len, split_size, MIN_PART, BLOCK_N)

    p_q = q + i_b * stride_q_b + o_h[None, :] * stride_q_h + o_d[:, None]
    b_q = tl.load(p_q, mask=m_d[:, None] & m_g[None, :], other=0.0)  # [BLOCK_D, BLOCK_G]
    p_k = k + i_b * stride_k_b + i_kv * stride_k_h + o_d[None, :]
    p_v = v + i_b * stride_v_b + i_kv * stride_v_h + o_v[:, None]
    p_ids = page_ids
    if page_ids is not None:
        p_ids += i_b * stride_ids_b + i_kv * stride_ids_h
    b_step = None
    if words is not None:
        p_words = words + i_b * stride_words_b + i_kv * stride_words_h
        b_q, b_step = in_integers(b_q)
    b_unit = tl.full([], 2.0**-24, tl.float32)  # the least scale of V

    b_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_sums = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)  # summed over tokens once, at the end
    b_out = tl.zeros([BLOCK_V, BLOCK_G], tl.float32)
    for i_n in range(i_start, i_end, BLOCK_N):
        b_slot, m_n, m_wild = slots_of(p_ids, i_n, b_len, num_slots, page_pitch, PAGE_SIZE, BLOCK_N)
        m_nd = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + b_slot[:, None] * stride_k_t, mask=m_nd, other=0)
        b_word = None
        if words is not None:
            b_word = tl.load(p_words + b_slot, mask=m_n, other=0)
        b_logits = logits_of(b_k, b_word, b_q, b_step, scale, softcap)
        b_logits = tl.where(m_n[:, None], b_logits, float("-inf"))
        if page_ids is not None:  # an id out of range reads nothing and poisons the row
            b_logits = tl.where(m_wild[:, None], float("nan"), b_logits)
        if logits is not None:
            o_n = i_n + tl.arange(0, BLOCK_N)
            p_logits = logits + i_b * stride_logits_b + o_h[None, :] * stride_logits_h
            m_logits = (o_n < b_len)[:, None] & m_g[None, :]
            store_logits(p_logits + o_n[:, None], b_logits, m_logits)

        m_vn = m_v[:, None] & m_n[None, :]
        b_v = tl.load(p_v + b_slot[None, :] * stride_v_t, mask=m_vn, other=0)
        b_max, b_sums, b_out, b_unit = attend(
            b_logits, b_v, b_word, b_max, b_sums, b_out, b_unit, b_q.dtype
        )

    m_wrong = (b_asked < 0) | (b_asked > num_positions)  # a length that cannot be
    o_row = i_b * (tl.num_programs(0) // tl.cdiv(G, BLOCK_G) * G) + o_h
    if words is not None:
        b_out *= b_unit / HEADROOM
    store_state(out, lse, b_max, b_sums, b_out, o_row, m_wrong, m_g, DV, m_v)


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
    out: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float = 0.0,
    max_len: int = NO_BOUND,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    places = Places.of(k, v, page_ids, page_size, max_len)
    meta = config(head_dim, q.dtype, group, page_ids is not None)
    if words is not None:
        meta = meta | {"num_warps": 8}  # codes are widened in registers
    programs = num_kv_heads * -(-group // meta["BLOCK_G"])
    splits = Splits.of(q, v, batch * programs, places.num_positions, out, lse)
    decode_attention_kernel[(programs, batch, splits.number)](
        q,
        k,
        v,
        seq_lens,
        page_ids,
        words,
        logits,
        splits.partial_out,
        splits.partial_lse,
        scale,
        softcap or None,
        *q.stride()[:2],
        *places.kv_strides,
        *((0, 0) if words is None else words.stride()[:2]),
        *places.list_strides,
        *((0, 0) if logits is None else logits.stride()[:2]),
        *places.slots,
        places.num_positions,
        splits.size,
        G=group,
        D=head_dim,
        DV=v.shape[-1],
        PAGE_SIZE=page_size,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_V=triton.next_power_of_2(v.shape[-1]),
        MIN_PART=MIN_SPLIT,
        **meta,
        **COMPILE,
    )
    return splits.merged()
