"""store_segments: closed segments, written through to the host and into the index."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def store_segments(
    k: Tensor,
    v: Tensor,
    slot_rows: Tensor,
    seq_lens: Tensor,
    starts: Tensor,
    num_units: Tensor,
    closed: Tensor,
    pool: list[Tensor],
    centroids: Tensor,
) -> None:
    """Copy the newest unit's tokens to the pool, and write its mean key.

    In a row with closed > 0 the newest unit u = num_units - 1 holds pool rows
    [starts[u], starts[u + 1]), `closed` of them. Its tokens are in some slots of [0, seq_lens);
    each is copied to its pool row, and centroids[u] becomes the mean of their keys.

    Args:
        k, v: [B, H, T, D] of one dtype: fp32, fp16 or bf16; any strides but that of D, which is a
            multiple of 16 and at most 512.
        slot_rows: [B, H, T'] int32, the pool row of each slot, T' >= seq_lens; contiguous in the
            last dimension.
        seq_lens: [B] int32.
        starts: [B, H, U + 1] int32, contiguous in the last dimension.
        num_units: [B] int32, at most U.
        closed: [B] int32, 0 where nothing is to be done.
        pool: blocks [B, H, R, 2, D] of k's dtype in host memory, contiguous, pinned where k is on a
            GPU: together rows 0, 1, ..., K and V of a row side by side; changed in place.
            1 to 32 blocks.
        centroids: [B, H, U, D] of k's dtype, contiguous in the last two; changed in place.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also rows that the
            pool or the slots have not. Nothing has been changed then.
    """
    _op(k, v, slot_rows, seq_lens, starts, num_units, closed, pool, centroids)


def reference(k, v, slot_rows, seq_lens, starts, num_units, closed, pool, centroids):
    for row in closed.nonzero().flatten().tolist():
        unit = int(num_units[row]) - 1
        length = int(seq_lens[row])
        for head in range(k.shape[1]):
            begin, end = starts[row, head, unit : unit + 2].tolist()
            held = slot_rows[row, head, :length]
            slots = ((held >= begin) & (held < end)).nonzero().flatten()
            centroids[row, head, unit] = k[row, head, slots].mean(0)
            first = 0
            for block in pool:
                here = held[slots] - first
                inside = (here >= 0) & (here < block.shape[2])
                for part, source in enumerate((k, v)):
                    block[row, head, here[inside].to(block.device), part] = source[
                        row, head, slots[inside]
                    ].to(block.device)
                first += block.shape[2]


def fake(k, v, slot_rows, seq_lens, starts, num_units, closed, pool, centroids):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(k, *rest):
        extension.store_segments(backend, k, *rest, raw_stream(k))

    return run


_op = bind(
    "store_segments",
    "(Tensor k, Tensor v, Tensor slot_rows, Tensor seq_lens, Tensor starts, Tensor num_units,"
    " Tensor closed, Tensor(a!)[] pool, Tensor(b!) centroids) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
