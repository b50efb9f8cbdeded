"""select_pages in Triton: exact top pages by bisection on the bits of the scores, no sort.

Grid (H, B). One program serves one row: it bisects the floats, in their order, for the score of
the last page that wins a place, counting the pages at or above the middle in one pass over the
scores per halving; then it walks the pages once more in ascending order and writes those that are
forced, above that score, or among the oldest that equal it. Bytes: 4 P read from memory once (the
later passes, 32 at most, hit the cache) and 4 K written; the time is latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, on_its_device

# Floats order like their bits once the bits of negative ones are flipped; these are the ends.
ORDER_LOWEST = tl.constexpr(-0x7F800001)  # of -inf
ORDER_HIGHEST = tl.constexpr(0x7F800000)  # of inf
GROWING = ["stride_b", "stride_h", "stride_table_b", "stride_table_h", "num_pages", "num_selected"]


@triton.jit
def float_of_order(order):
    """The float at a place in the order, int64 -> fp32."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def load_scores(p_scores, o_p, m_p):
    """Scores of pages, NaN as the lowest."""
    b_scores = tl.load(p_scores + o_p, mask=m_p, other=float("-inf"))
    return tl.where(b_scores == b_scores, b_scores, float("-inf"))


@triton.jit(do_not_specialize=GROWING)
def select_pages_kernel(
    scores,  # [B, H, P]
    seq_lens,  # [B]
    page_ids,  # [B, H, K]
    selected_lens,  # [B]
    table,  # [B, 1 or H, N]; None: no pages
    pages,  # [B, H, K]
    stride_b,
    stride_h,
    stride_table_b,
    stride_table_h,
    num_pages,  # P
    num_selected,  # K
    num_recent,
    num_sink,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_scores = scores + i_b * stride_b + i_h.to(tl.int64) * stride_h
    i_row = (i_b * tl.num_programs(0) + i_h) * num_selected
    p_ids = page_ids + i_row
    if table is not None:
        p_table = table + i_b * stride_table_b + i_h.to(tl.int64) * stride_table_h
        p_pages = pages + i_row
    o_block = tl.arange(0, BLOCK)

    b_len = tl.load(seq_lens + i_b)
    num_used = tl.minimum(tl.cdiv(tl.maximum(b_len, 0), PAGE_SIZE), num_pages)
    # Pages [i_first, i_last) compete for `places`; a row that fits competes for nothing.
    is_cut = num_used > num_selected
    i_first = tl.where(is_cut, num_sink, 0)
    i_last = tl.where(is_cut, num_used - num_recent, 0)
    places = tl.where(is_cut, num_selected - num_recent - num_sink, 0)

    # Invariant: at least `places` pages score at or above `low`, fewer at or above `high`.
    low = tl.full([], ORDER_LOWEST, tl.int64)
    high = tl.where(is_cut, tl.full([], ORDER_HIGHEST, tl.int64) + 1, low + 1)
    while high - low > 1:
        middle = low + (high - low) // 2
        threshold = float_of_order(middle)
        b_count = tl.zeros([BLOCK], tl.int32)
        for i_p in range(i_first, i_last, BLOCK):
            b_scores = load_scores(p_scores, i_p + o_block, i_p + o_block < i_last)
            b_count += (b_scores >= threshold).to(tl.int32)
        count = tl.sum(b_count, 0)
        low = tl.where(count >= places, middle, low)
        high = tl.where(count >= places, tl.where(count == places, middle + 1, high), middle)
    threshold = float_of_order(low)

    b_count = tl.zeros([BLOCK], tl.int32)
    for i_p in range(i_first, i_last, BLOCK):
        b_scores = load_scores(p_scores, i_p + o_block, i_p + o_block < i_last)
        b_count += (b_scores > threshold).to(tl.int32)
    ties = places - tl.sum(b_count, 0)  # places left for pages that equal the threshold

    num_kept = tl.minimum(num_used, num_selected)
    num_tied = ties * 0
    num_written = ties * 0
    for i_p in range(0, num_used, BLOCK):
        o_p = i_p + o_block
        m_competes = (o_p >= i_first) & (o_p < i_last)
        b_scores = load_scores(p_scores, o_p, m_competes)
        m_tied = m_competes & (b_scores == threshold)
        b_rank = num_tied + tl.cumsum(m_tied.to(tl.int32), 0)
        m_keep = (o_p < num_used) & ((o_p < i_first) | (o_p >= i_last))  # forced
        m_keep |= m_competes & (b_scores > threshold)
        m_keep |= m_tied & (b_rank <= ties)
        b_place = num_written + tl.cumsum(m_keep.to(tl.int32), 0) - 1
        tl.store(p_ids + b_place, o_p, mask=m_keep)
        if table is not None:
            tl.store(p_pages + b_place, tl.load(p_table + o_p, mask=m_keep), mask=m_keep)
        num_tied += tl.sum(m_tied.to(tl.int32), 0)
        num_written += tl.sum(m_keep.to(tl.int32), 0)
    for i_k in range(num_kept, num_selected, BLOCK):
        o_k = i_k + o_block
        b_none = tl.full([BLOCK], -1, tl.int32)
        tl.store(p_ids + o_k, b_none, mask=o_k < num_selected)
        if table is not None:
            tl.store(p_pages + o_k, b_none, mask=o_k < num_selected)

    if i_h == 0:
        b_tail = b_len - (num_used - 1) * PAGE_SIZE  # tokens in the last page
        b_cut_len = (num_selected - 1) * PAGE_SIZE + b_tail
        tl.store(selected_lens + i_b, tl.where(is_cut, b_cut_len, b_len))


def list_strides(table: Tensor | None) -> tuple[int, int]:
    """Of table [B, N] or [B, 1 or H, N] over B and H; 0 over H for a list that sets share."""
    if table is None:
        return 0, 0
    return table.stride(0), table.stride(1) if table.ndim == 3 and table.shape[1] > 1 else 0


@on_its_device
def launch(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    num_pages: int,
    num_recent: int,
    num_sink: int,
    table: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, num_sets, total = scores.shape
    page_ids = scores.new_empty(batch, num_sets, num_pages, dtype=torch.int32)
    selected_lens = torch.empty_like(seq_lens)
    block = min(max(triton.next_power_of_2(total), 512), 8192)
    select_pages_kernel[(num_sets, batch)](
        scores,
        seq_lens,
        page_ids,
        selected_lens,
        table if pages is not None else None,
        pages,
        *scores.stride()[:2],
        *list_strides(table),
        total,
        num_pages,
        num_recent,
        num_sink,
        PAGE_SIZE=page_size,
        BLOCK=block,
        num_warps=block // 512,  # sixteen scores a thread
        **COMPILE,
    )
    return page_ids, selected_lens
