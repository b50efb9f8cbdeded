"""The number of parts into which a GPU kernel splits the tokens of one sequence and head."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

MIN_SPLIT = 256  # tokens: below this, a split costs more to merge than it saves
MAX_SPLITS = 128


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU. Without a GPU, as under an interpreter: 132, as on Hopper."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def plan_splits(programs: int, chunks: int, slots: int) -> tuple[int, int]:
    """The number of splits and the tokens in each, computed from shapes alone.

    Picks the split count with the least waves x (tokens of a split + a fixed cost), so that the
    last wave is not nearly empty.

    Args:
        programs: programs of one split.
        chunks: positions in units of MIN_SPLIT tokens, rounded up.
        slots: programs that the device runs at once.
    """

    def cost(size: int) -> int:  # of splits of `size` chunks
        waves = -(-programs * -(-chunks // size) // slots)
        return waves * (size * MIN_SPLIT + 128)

    smallest = -(-chunks // MAX_SPLITS)
    size = min(range(smallest, chunks + 1), key=cost)
    return -(-chunks // size), size * MIN_SPLIT
