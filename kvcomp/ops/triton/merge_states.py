"""merge_states in Triton: two partial attentions to one, by their log-sum-exps.

Grid (tiles of rows). A row is one query head of one sequence; one program merges BLOCK_R of them,
all of D at once. Bytes: 2 D elements read and D written per row, and three lse. A side that
attended to nothing (lse = -inf) is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, LOG2E, on_its_device

BLOCK_ELEMENTS = 1024  # of a program's tile [BLOCK_R, BLOCK_D]: few rows, so many programs


@triton.jit(do_not_specialize=["num_rows"])
def merge_states_kernel(
    out_a,  # [rows, D]
    lse_a,  # [rows]
    out_b,
    lse_b,
    out,
    lse,
    num_rows,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < num_rows
    b_lse_a = tl.load(lse_a + o_r, mask=m_r, other=float("-inf"))
    b_lse_b = tl.load(lse_b + o_r, mask=m_r, other=float("-inf"))
    b_max = tl.maximum(b_lse_a, b_lse_b)
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_weight_a = tl.exp2((b_lse_a - b_base) * LOG2E)
    b_weight_b = tl.exp2((b_lse_b - b_base) * LOG2E)
    b_sum = b_weight_a + b_weight_b
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)

    o_rd = o_r[:, None] * D + o_d[None, :]
    m_rd = m_r[:, None] & (o_d < D)[None, :]
    m_a = m_rd & (b_lse_a != float("-inf"))[:, None]
    m_b = m_rd & (b_lse_b != float("-inf"))[:, None]
    b_a = tl.load(out_a + o_rd, mask=m_a, other=0.0).to(tl.float32)
    b_b = tl.load(out_b + o_rd, mask=m_b, other=0.0).to(tl.float32)
    b_out = b_a * (b_weight_a / b_sum)[:, None] + b_b * (b_weight_b / b_sum)[:, None]
    tl.store(out + o_rd, b_out.to(out.dtype.element_ty), mask=m_rd)
    tl.store(lse + o_r, b_max + tl.log(b_sum), mask=m_r)  # -inf where both sides are empty


@on_its_device
def launch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    head_dim = out_a.shape[-1]
    block_d = triton.next_power_of_2(head_dim)
    block_r = max(1, BLOCK_ELEMENTS // block_d)
    merge_states_kernel[(triton.cdiv(lse.numel(), block_r),)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        lse,
        lse.numel(),
        D=head_dim,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
        **COMPILE,
    )
    return out, lse
