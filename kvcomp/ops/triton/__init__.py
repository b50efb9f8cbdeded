"""Triton kernels, one file per op, each with launch(*schema arguments) -> the op's outputs.

Names: i_ program ids and loop positions, o_ offsets, p_ pointers, b_ loaded or computed blocks, m_
masks. Offsets are int64 before they meet a stride. Configurations are fixed tables, never tuned at
run time. Arguments have been checked before launch().
"""

from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * LOG2E), one instruction
COMPILE = {"enable_fp_fusion": True}  # for every launch: Triton's default differs by version
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device; the tensors may live on another one."""

    @wraps(launch)
    def guarded(first: torch.Tensor, *args):
        with torch.cuda.device_of(first):  # nothing for a CPU tensor
            return launch(first, *args)

    return guarded


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, in full precision where the operands are fp32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # NumPy has no bf16 and would multiply its bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
