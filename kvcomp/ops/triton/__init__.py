"""Triton kernels, one file per op, each with launch(*schema arguments) -> the op's outputs.

Names: i_ program ids and loop positions, o_ offsets, p_ pointers, b_ loaded or computed blocks, m_
masks. Offsets are int64 before they meet a stride. Configurations are fixed tables, never tuned at
run time. Arguments have been checked before launch().
"""

from functools import cache

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * LOG2E), one instruction
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; the interpreter plays an H200."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
