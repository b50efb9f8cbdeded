"""page_scores in Triton: the probability that each page receives, reduced over heads.

Grid (tiles of pages, groups, B). One program scores BLOCK_P pages for one group of heads: it walks
the group's heads with the tile of tokens in registers, then sums each page. The max over heads is
taken of logit - lse, so a token costs one exponential however many heads there are. Pages past a
row's length are written as 0 and read nothing. Bytes: 4 N per query head, or 2 N in fp16,
4 P per group written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, LOG2E, on_its_device

BLOCK_TOKENS = 128  # of a tile, one per thread: a 16K row is 128 programs


@triton.jit(do_not_specialize=["stride_b", "stride_h", "num_slots", "num_pages"])
def page_scores_kernel(
    logits,  # [B, Hq, N]
    lse,  # [B, Hq]
    seq_lens,  # [B]
    scores,  # [B, groups, P]
    stride_b,
    stride_h,
    num_slots,  # N
    num_pages,  # P
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    USE_MAX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,  # tokens of a page at a time; below PAGE_SIZE only for huge pages
):
    i_p, i_group, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_groups = tl.num_programs(1)
    i_first = i_group.to(tl.int64) * G  # head
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    b_len = tl.minimum(tl.load(seq_lens + i_b), num_slots)
    p_logits = logits + i_b * stride_b
    p_lse = lse + i_b * num_groups * G

    b_scores = tl.zeros([BLOCK_P], tl.float32)
    if i_p * BLOCK_P * PAGE_SIZE < b_len:
        for i_t in range(0, PAGE_SIZE, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            o_n = o_p[:, None] * PAGE_SIZE + o_t[None, :]
            m_n = (o_t < PAGE_SIZE)[None, :] & (o_n < b_len)
            if USE_MAX:
                b_tokens = tl.full([BLOCK_P, BLOCK_T], float("-inf"), tl.float32)
            else:
                b_tokens = tl.zeros([BLOCK_P, BLOCK_T], tl.float32)
            for i_g in tl.range(G, loop_unroll_factor=8):  # eight heads in flight
                p_n = p_logits + (i_first + i_g) * stride_h + o_n
                b_lse = tl.load(p_lse + i_first + i_g)
                b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)  # nothing attended
                b_logits = tl.load(p_n, mask=m_n, other=float("-inf"))
                b_logprobs = b_logits.to(tl.float32) - b_lse
                if USE_MAX:  # a NaN of decode_attention stays one
                    b_tokens = tl.maximum(b_tokens, b_logprobs, tl.PropagateNan.ALL)
                else:
                    b_tokens += tl.exp2(b_logprobs * LOG2E)
            if USE_MAX:
                b_tokens = tl.exp2(b_tokens * LOG2E)
            b_scores += tl.sum(b_tokens, 1)
    tl.store(
        scores + (i_b * num_groups + i_group) * num_pages + o_p, b_scores, mask=o_p < num_pages
    )


@on_its_device
def launch(
    logits: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int, num_groups: int, use_max: bool
) -> Tensor:
    batch, num_heads, num_slots = logits.shape
    num_pages = triton.cdiv(num_slots, page_size)
    scores = lse.new_empty(batch, num_groups, num_pages)
    block_t = min(triton.next_power_of_2(page_size), BLOCK_TOKENS)
    block_p = BLOCK_TOKENS // block_t
    page_scores_kernel[(triton.cdiv(num_pages, block_p), num_groups, batch)](
        logits,
        lse,
        seq_lens,
        scores,
        *logits.stride()[:2],
        num_slots,
        num_pages,
        G=num_heads // num_groups,
        PAGE_SIZE=page_size,
        USE_MAX=use_max,
        BLOCK_P=block_p,
        BLOCK_T=block_t,
        num_warps=4,
        **COMPILE,
    )
    return scores
