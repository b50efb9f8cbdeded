"""hadamard in Triton: rows times the Walsh-Hadamard matrix over sqrt(D).

One program turns BLOCK_N rows, in log2(D) rounds of sums and differences of pairs, each of which is
the same as on the CPU. Bytes: each row, read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.triton import COMPILE, on_its_device

BLOCK_ELEMENTS = 2048  # of a program's tile


@triton.jit
def turn_pairs(b_x, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Sums and differences of elements that are HALF apart."""
    b_pairs = tl.permute(tl.reshape(b_x, [N, D // (2 * HALF), 2, HALF]), (0, 1, 3, 2))
    b_a, b_b = tl.split(b_pairs)
    b_pairs = tl.permute(tl.join(b_a + b_b, b_a - b_b), (0, 1, 3, 2))
    return tl.reshape(b_pairs, [N, D])


@triton.jit
def turned(b_x, factor, N: tl.constexpr, D: tl.constexpr, ROUNDS: tl.constexpr):
    """Rows b_x [N, D] times the matrix; D is 2**ROUNDS, factor 1 / sqrt(D)."""
    for i in tl.static_range(ROUNDS):
        b_x = turn_pairs(b_x, N, D, 2**i)
    return b_x * factor


@triton.jit
def hadamard_kernel(
    x,  # [rows, D]
    out,  # [rows, D]
    factor,
    num_rows,
    D: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, D)
    mask = (o_n < num_rows)[:, None] & (o_d >= 0)[None, :]
    p_x = o_n[:, None] * D + o_d[None, :]
    b_x = tl.load(x + p_x, mask=mask, other=0.0).to(tl.float32)
    b_x = turned(b_x, factor, BLOCK_N, D, ROUNDS)
    tl.store(out + p_x, b_x.to(out.dtype.element_ty), mask=mask)


def factor_of(head_dim: int) -> float:
    """1 / sqrt(D) in fp32, as the reference has it."""
    return torch.tensor(head_dim, dtype=torch.float32).rsqrt().item()


@on_its_device
def launch(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    head_dim = x.shape[-1]
    num_rows = x.numel() // head_dim
    if num_rows == 0:
        return out
    block_n = max(1, BLOCK_ELEMENTS // head_dim)
    hadamard_kernel[(triton.cdiv(num_rows, block_n),)](
        x,
        out,
        factor_of(head_dim),
        num_rows,
        D=head_dim,
        ROUNDS=head_dim.bit_length() - 1,
        BLOCK_N=block_n,
        num_warps=4,
        **COMPILE,
    )
    return out
