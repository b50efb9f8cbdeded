"""How much memory is left."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def free_memory(device: str) -> float:
    """Bytes that may still be taken; infinity where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    facts = dict(line.split(":") for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024
