"""HostPool: K and V of all tokens in host memory, in blocks that never move.

A row is one token of one KV head with K and V side by side, so one read over the link fetches both.
If the cache is on a GPU, blocks are pinned, and kernels read and write them directly.
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor

from kvcomp.cache.rows import Rows
from kvcomp.ops.quantize_rows import WORD_ROOM, packed, unpacked

FIRST_ROWS = 256  # smallest block, in rows per sequence and head
GROWTH = 1 / 4  # a new block is at least this share of all rows
MAX_BLOCKS = 32  # limit of the ops; 1.25 ** 31 is a thousand times the first block


class HostMemoryError(MemoryError):
    """Host memory was refused: it is over the limit, or it could not be allocated or pinned."""


class HostMemory:
    """The host memory that the pools of one cache share.

    Attributes:
        limit: largest number of bytes; None: no limit.
        used: bytes taken so far. A pinned tensor counts as the next power of two, because torch
            pins that much.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
        """Allocate memory and add it to `used`.

        Raises:
            HostMemoryError: the memory was refused; `used` has not changed.
        """
        size = dtype.itemsize
        for count in shape:
            size *= count
        size = taken(size, pinned)
        if self.limit is not None and self.used + size > self.limit:
            raise HostMemoryError(
                f"kvcomp: host memory for K and V: limit of {self.limit} bytes, of which"
                f" {self.used} are taken; {size} more are needed"
            )
        try:
            memory = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        except RuntimeError as error:
            raise HostMemoryError(
                f"kvcomp: host memory for K and V: {size} bytes{' pinned' if pinned else ''} were"
                f" refused, {self.used} are taken: {error}"
            ) from error
        self.used += size
        return memory


def taken(size: int, pinned: bool) -> int:
    """Bytes of host memory that a tensor of `size` bytes takes."""
    return 1 << (size - 1).bit_length() if pinned and size else size


class HostPool:
    """Rows [B, Hkv, rows, 2, D] of one layer, [B, Hkv, rows, D + Dv] where V has another size, or
    [B, Hkv, rows, 2 D + 16] of codes and words.

    Attributes:
        blocks: [B, Hkv, R, ...] each, together rows 0, 1, ...
        row_bytes: bytes of a row.
        capacity: number of rows that fit, per sequence and head.
    """

    def __init__(self, like: Rows, memory: HostMemory) -> None:
        """An empty pool for rows of the shape, dtype and device of `like` [B, Hkv, n, D]."""
        k = like.k
        self.memory = memory
        self.device = k.device
        self.blocks: list[Tensor] = []
        self.capacity = 0
        self._coded = like.words is not None
        self._heads = k.shape[:2]  # B, Hkv
        self._sizes = k.shape[3], like.v.shape[3]
        alike = (2, k.shape[3]) if k.shape == like.v.shape else (sum(self._sizes),)
        self._row = (sum(self._sizes) + WORD_ROOM,) if self._coded else alike
        self._dtype = k.dtype
        self.row_bytes = math.prod(self._row) * k.element_size()

    def __deepcopy__(self, memo: dict) -> HostPool:
        copy = object.__new__(HostPool)
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)
        copy.memory = deepcopy(self.memory, memo)
        copy.select(torch.arange(self._heads[0]))  # a tensor's own deepcopy would not be pinned
        return copy

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def reserve(self, rows: int) -> None:
        """Make room for rows [0, rows).

        Raises:
            HostMemoryError: the memory was refused; what is there stays.
        """
        if rows <= self.capacity:
            return
        more = max(rows - self.capacity, FIRST_ROWS, int(GROWTH * self.capacity))
        self.blocks.append(self._empty(*self._heads, more, *self._row))
        self.capacity += more
        assert len(self.blocks) <= MAX_BLOCKS, "geometric growth keeps blocks few"

    def write(self, row: int, first: int, new: Rows) -> None:
        """Rows [first, first + n) of sequence `row` become `new`, [Hkv, n, ...]."""
        # Laid out as rows are, on the cache's device. To pinned memory they are copied head by head
        # without gaps: anything else is staged in other host memory, and the host waits for it.
        if self._coded:
            rows = packed(new.k, new.v, new.scales)
        else:
            rows = torch.cat(new.parts, 2).unflatten(2, self._row)
        for block, inside, outside in self._spans(first, first + rows.shape[1]):
            if not self._pinned:
                block[row, :, inside].copy_(rows[:, outside])
                continue
            for into, source in zip(block[row, :, inside], rows[:, outside], strict=True):
                into.copy_(source, non_blocking=True)

    def read(self, row: int, first: int, last: int) -> Rows:
        """Rows [first, last) of sequence `row`, [Hkv, last - first, ...], on the cache's device."""
        spans = self._spans(first, last)
        pieces = [block[row, :, inside].to(self.device) for block, inside, _ in spans]
        shape = self._heads[1], 0, *self._row
        empty = torch.empty(shape, dtype=self._dtype, device=self.device)
        rows = torch.cat([empty, *pieces], 1)
        return Rows(*(unpacked(rows) if self._coded else rows.flatten(2).split(self._sizes, 2)))

    def select(self, rows: Tensor) -> None:
        """Sequences become `rows` ([B'] int64). This copies all blocks.

        Raises:
            HostMemoryError: the memory was refused; what is there stays.
        """
        rows = rows.cpu()
        if self._pinned:  # kernels write the blocks, and the host reads them now
            torch.cuda.current_stream(self.device).synchronize()
        used = self.memory.used
        self.memory.used -= sum(taken(block.nbytes, self._pinned) for block in self.blocks)
        try:
            blocks = [self._empty(len(rows), *block.shape[1:]) for block in self.blocks]
        except HostMemoryError:
            self.memory.used = used
            raise
        for block, new in zip(self.blocks, blocks, strict=True):
            torch.index_select(block, 0, rows, out=new)
        self.blocks, self._heads = blocks, torch.Size((len(rows), self._heads[1]))

    def _empty(self, *shape: int) -> Tensor:
        return self.memory.empty(shape, self._dtype, self._pinned)

    def _spans(self, first: int, last: int) -> list[tuple[Tensor, slice, slice]]:
        """The blocks with rows [first, last): block, its rows, and these counted from `first`."""
        spans, begin = [], 0
        for block in self.blocks:
            low, high = max(first, begin), min(last, begin + block.shape[2])
            if low < high:
                spans.append(
                    (block, slice(low - begin, high - begin), slice(low - first, high - first))
                )
            begin += block.shape[2]
        return spans
