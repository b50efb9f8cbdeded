"""What decode_attention and append_attention share: a tile of tokens, from the list of them to the
softmax, and the splits, from their plan to their merge.

S = K qᵀ [BLOCK_N, BLOCK_G] and Oᵀ = Vᵀ P [Dv, BLOCK_G]: tokens fill the rows that tensor cores
insist on, the rows of q are their narrow side.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops._splits import MAX_SPLITS, MIN_SPLIT, num_multiprocessors, plan_splits
from kvcomp.ops.decode_attention import given_or_made, room
from kvcomp.ops.triton import COMPILE, LOG2E, dot

HEADROOM = tl.constexpr(32768.0)  # below the largest fp16
PROGRAMS_PER_SM = 2  # what shared memory and registers allow on Hopper

# These grow while a sequence is decoded: no second compilation at a multiple of 16.
GROWING = ["num_slots", "page_pitch", "num_positions", "split_size", "stride_ids_b", "stride_ids_h"]
GROWING += ["stride_logits_b", "stride_logits_h", "stride_words_b", "stride_words_h"]


@cache
def config(head_dim: int, dtype: torch.dtype, rows: int, paged: bool) -> dict[str, int]:
    """Tiles and pipeline depth: 32 KiB of K and V a tile, three in flight, two programs per SM."""
    block_g = triton.next_power_of_2(rows)
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


# --- a tile ---------------------------------------------------------------------------------------


@triton.jit
def split_of(b_len, split_size, MIN_PART: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions [start, end) of this program's split: equal parts of what the sequence has,
    whatever there is room for; at most split_size."""
    num_splits = tl.num_programs(2)
    part = tl.cdiv(tl.cdiv(b_len, num_splits), BLOCK_N) * BLOCK_N
    part = tl.minimum(tl.maximum(part, MIN_PART), split_size)
    i_start = tl.program_id(2) * part
    return i_start, tl.minimum(i_start + part, b_len)


@triton.jit
def slots_of(
    p_ids, i_n, b_len, num_slots, page_pitch, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Slots of the tile at position i_n, which of them there are, and which ids are out of range.

    p_ids: the list of this sequence and head; None: dense.
    """
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_len = o_n < b_len
    if p_ids is None:
        return o_n.to(tl.int64), m_len, m_len & (o_n < 0)
    else:
        # A page that holds whole blocks needs one id per block, smaller ones one per token.
        o_page = i_n // PAGE_SIZE if PAGE_SIZE % BLOCK_N == 0 else o_n // PAGE_SIZE
        b_page = tl.load(p_ids + o_page, mask=o_page * PAGE_SIZE < b_len, other=-1)
        b_slot = b_page.to(tl.int64) * page_pitch + o_n % PAGE_SIZE
        m_above = b_slot >= num_slots
        m_n = m_len & (b_page >= 0) & ~m_above
        return b_slot, m_n, m_len & ((b_page < -1) | m_above)


@triton.jit
def scale_of(b_word):
    """The fp16 in the lower half of each word."""
    return b_word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def in_integers(b_q):
    """q [D, G] as integers of up to 14 bits and a sign, and the power of two that is their step.

    fp16 holds those of 16-bit q exactly. A row with NaN or an infinity has the step NaN.
    """
    b_wide = b_q.to(tl.float32)
    b_bits = tl.max(b_wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    b_above = tl.maximum((b_bits >> 23) - 126, -100) - 14  # of the power of two above the row
    m_finite = b_bits < 0x7F800000
    b_inverse = ((127 - b_above) << 23).to(tl.float32, bitcast=True)
    b_step = ((127 + b_above) << 23).to(tl.float32, bitcast=True)
    b_wide = tl.where(m_finite[None, :], b_wide * b_inverse[None, :], 0.0)
    b_wide = (b_wide + 12582912.0) - 12582912.0  # to the nearest, ties to even
    b_step = tl.where(m_finite, b_step, float("nan"))
    return b_wide.to(tl.float32 if b_q.dtype == tl.float32 else tl.float16), b_step


@triton.jit
def add_codes(b_v, b_v_scale, b_probs, b_out, b_decay, b_unit, dtype: tl.constexpr):
    """b_out decayed, plus V's codes times probabilities times scales; and the next b_unit.

    Both sums are relative to b_unit / HEADROOM, where b_unit is a power of two no smaller than any
    scale yet: so nothing overflows in fp16, and few bits are lost. A scale of NaN is no larger.
    """
    b_top = tl.max(tl.where(b_v_scale == b_v_scale, b_v_scale, 0.0), 0)
    b_bits = (b_top.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
    b_next = tl.maximum(b_unit, b_bits.to(tl.float32, bitcast=True))
    b_weights = b_probs * (b_v_scale * (HEADROOM / b_next))[:, None]
    b_decay = b_decay * (b_unit / b_next)
    return dot(b_v.to(dtype), b_weights.to(dtype), b_out * b_decay[None, :]), b_next


@triton.jit
def store_logits(p_logits, b_logits, mask):
    if p_logits.dtype.element_ty == tl.float16:  # finite logits stay so
        m_finite = tl.abs(b_logits) < float("inf")
        b_logits = tl.where(m_finite, tl.clamp(b_logits, -65504.0, 65504.0), b_logits)
    tl.store(p_logits, b_logits.to(p_logits.dtype.element_ty), mask=mask)


@triton.jit
def cap(b_logits, softcap):
    """softcap * tanh(logits / softcap)."""
    b_exp = tl.exp2(b_logits / softcap * 2.0 * LOG2E)  # inf: tanh is 1
    return softcap - 2.0 * softcap / (b_exp + 1.0)


@triton.jit
def logits_of(b_k, b_word, b_q, b_step, scale, softcap):
    """Logits [BLOCK_N, BLOCK_G] of keys [BLOCK_N, D].

    b_word: the tokens' scales; None: K holds no codes. softcap: None: no cap.
    """
    b_zeros = tl.zeros([b_k.shape[0], b_q.shape[1]], tl.float32)
    b_logits = dot(b_k.to(b_q.dtype), b_q, b_zeros) * scale
    if b_word is not None:
        b_logits *= b_step[None, :] * scale_of(b_word)[:, None]
    if softcap is not None:
        b_logits = cap(b_logits, softcap)
    return b_logits


@triton.jit
def attend(b_logits, b_v, b_word, b_max, b_sums, b_out, b_unit, dtype: tl.constexpr):
    """The state of the softmax (maximum, sums, output, unit of V's codes) with these tokens, too.

    b_word: None: V holds no codes. dtype: what codes are multiplied in.
    """
    b_new = tl.maximum(b_max, tl.max(b_logits, 0))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_decay = tl.exp2((b_max - b_base) * LOG2E)
    b_probs = tl.exp2((b_logits - b_base[None, :]) * LOG2E)
    b_sums = b_sums * b_decay[None, :] + b_probs
    if b_word is None:
        b_out = dot(b_v, b_probs.to(b_v.dtype), b_out * b_decay[None, :])
    else:
        b_v_scale = scale_of(b_word >> 16)
        b_out, b_unit = add_codes(b_v, b_v_scale, b_probs, b_out, b_decay, b_unit, dtype)
    return b_new, b_sums, b_out, b_unit


@triton.jit
def store_state(out, lse, b_max, b_sums, b_out, o_row, m_wrong, m_g, DV: tl.constexpr, m_v):
    """Output and lse of the rows o_row of [rows, splits]; NaN where m_wrong."""
    num_splits, i_split = tl.num_programs(2), tl.program_id(2)
    b_sum = tl.where(m_wrong, float("nan"), tl.sum(b_sums, 0))
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # nothing attended: b_out is 0
    b_lse = b_max + tl.log(b_sum)  # -inf where nothing was attended
    b_out = b_out / b_sum[None, :]
    o_row = o_row * num_splits + i_split
    tl.store(lse + o_row, b_lse, mask=m_g)
    o_v = tl.arange(0, b_out.shape[0])
    p_out = out + o_row[None, :] * DV + o_v[:, None]
    # The output of an empty split is never read, so not written; that of an empty row is.
    m_out = m_g & (tl.where(num_splits > 1, b_lse, 0.0) != float("-inf"))
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_v[:, None] & m_out[None, :])


# --- the splits -----------------------------------------------------------------------------------


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


class Splits(NamedTuple):
    """Where the programs of a launch leave their states: in out and lse, if there is one split."""

    out: Tensor  # [..., Dv]
    lse: Tensor  # [...]
    number: int
    size: int  # tokens
    partial_out: Tensor
    partial_lse: Tensor
    made: tuple[Tensor, Tensor]  # what the op returns

    @classmethod
    def of(
        cls,
        q: Tensor,
        v: Tensor,
        programs: int,
        num_positions: int,
        out: Tensor | None,
        lse: Tensor | None,
    ) -> Splits:
        """For q [..., D], whose rows `programs` programs share in each split, and v [..., Dv]; out
        and lse of the caller, if it has any."""
        count, size = plan_splits(
            programs,
            max(1, -(-num_positions // MIN_SPLIT)),
            num_multiprocessors(q.device) * PROGRAMS_PER_SM,
        )
        made = room(q, v, out, lse)
        out, lse = given_or_made(out, lse, made)
        if count == 1:
            return cls(out, lse, count, size, out, lse, made)
        partial_lse = lse.new_empty(*lse.shape, count)
        partial_out = lse.new_empty(*partial_lse.shape, v.shape[-1])
        return cls(out, lse, count, size, partial_out, partial_lse, made)

    def merged(self) -> tuple[Tensor, Tensor]:
        """What the op returns, once the splits are in out and lse."""
        if self.number > 1:
            head_dim = self.out.shape[-1]
            merge_splits_kernel[(self.lse.numel(),)](
                self.partial_out,
                self.partial_lse,
                self.out,
                self.lse,
                self.number,
                D=head_dim,
                BLOCK_D=triton.next_power_of_2(head_dim),
                BLOCK_S=MAX_SPLITS,
                CHUNK=8,
                num_warps=4,
                **COMPILE,
            )
        return self.made


class Places(NamedTuple):
    """How the kernels find the tokens of K and V.

    A pool [pages, Hkv, P, D] is slots like others, of which page u has P from a multiple of u on.
    """

    kv_strides: tuple[int, ...]  # of k, then of v: over B, Hkv and T
    list_strides: tuple[int, int]  # of page_ids over B and Hkv; 0 for a list that heads share
    slots: tuple[int, int]  # how many there are, and from one page to the next
    num_positions: int  # T, or the listed pages' tokens; fewer where no row is so long

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, page_ids: Tensor | None, page_size: int, max_len: int
    ) -> Places:
        slots, strides = (k.shape[2], page_size), (*k.stride()[:3], *v.stride()[:3])
        if page_ids is None:
            return cls(strides, (0, 0), slots, min(k.shape[2], max_len))
        num_positions = min(page_ids.shape[-1] * page_size, max_len)
        if page_ids.ndim == 3:
            of_heads = page_ids.stride(1) if page_ids.shape[1] > 1 else 0
            return cls(strides, (page_ids.stride(0), of_heads), slots, num_positions)
        pages, size = k.shape[0], k.shape[2]
        pitch = size if pages <= 1 or size == 1 else k.stride(0) // k.stride(2)
        strides = sum(((0, x.stride(1), x.stride(0 if size == 1 else 2)) for x in (k, v)), ())
        slots = (pages - 1) * pitch + size if pages else 0, pitch
        return cls(strides, (page_ids.stride(0), 0), slots, num_positions)
