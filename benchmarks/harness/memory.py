"""Memory: what this process has taken, and what the machine has left."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class Memory:
    """Bytes that came since this object was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        gc.freeze()  # what is alive now is not listed any more
        self._rss = resident()
        self._allocated = torch.cuda.memory_allocated() if device == "cuda" else 0

    def look(self) -> tuple[int, int]:
        """Of tensors, and resident."""
        if self.device == "cuda":
            tensors = torch.cuda.memory_allocated() - self._allocated
        else:
            storages = [
                x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), Tensor)
            ]
            tensors = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        return tensors, resident() - self._rss


def resident() -> int:
    """Bytes of the process in memory; 0 where the system does not say."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak(call: Callable[[], object]) -> int:
    """Bytes by which the process grows at most while it does `call`; 0 where Linux cannot say."""
    gc.collect()
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        call()
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    marks = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return max(int(marks[0]) * 1024 - before, 0) if marks else 0


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
