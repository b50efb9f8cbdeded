"""store_segments: write closed segments to the host pool and their mean keys to the index."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops.hadamard import reference as hadamard
from kvcomp.ops.quantize_rows import dequantized, packed


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
    *,
    words: Tensor | None = None,
    turned: bool = False,
) -> None:
    """Copy the tokens of each sequence's newest unit to the pool and compute its mean key.

    If closed > 0, the newest unit u = num_units - 1 consists of the `closed` pool rows [starts[u],
    starts[u + 1]). Its tokens are in some of the slots [0, seq_lens). Each token is copied to its
    pool row, and centroids[u] becomes the mean of their keys.

    Args:
        k, v: [B, H, T, D] of the same dtype: fp32, fp16 or bf16; any strides on B, H and T, D
            contiguous, a multiple of 16 and at most 1024. V has D columns, or without
            `words` any such number, or 0.
        slot_rows: [B, H, T'] int32, the pool row of each slot, T' >= seq_lens; contiguous in the
            last dimension.
        seq_lens: [B] int32.
        starts: [B, H, U + 1] int32, contiguous in the last dimension.
        num_units: [B] int32, at most U.
        closed: [B] int32, 0 for sequences to skip.
        pool: 1 to 32 blocks [B, H, R, 2, D] of k's dtype in host memory, contiguous, pinned if k is
            on a GPU; changed in place. Together they hold rows 0, 1, ..., each K and then V.
            [B, H, R, D + Dv] where V has Dv columns, not D.
        centroids: [B, H, U, D] of k's dtype, contiguous in the last two; changed in place.
        words: [B, H, T'] int32, the scales of int8 k and v, as `quantize_rows` makes them. Blocks
            are then [B, H, R, 2 D + 16] int8: both codes of a row, its word, and zeros.
        turned: k are codes of turned keys; centroids are means of the keys before they were.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also rows that
            the pool or the slots do not have. Nothing is changed in that case.
    """
    tensors = k, v, slot_rows, seq_lens, starts, num_units, closed, pool, centroids
    _op(*tensors, words, turned)


def reference(
    k,
    v,
    slot_rows,
    seq_lens,
    starts,
    num_units,
    closed,
    pool,
    centroids,
    words=None,
    turned=False,
):
    keys = k
    if words is not None:
        keys = dequantized(k, v, words, centroids.dtype)[0]
        keys = hadamard(keys) if turned else keys
    for row in closed.nonzero().flatten().tolist():
        unit = int(num_units[row]) - 1
        length = int(seq_lens[row])
        for head in range(k.shape[1]):
            begin, end = starts[row, head, unit : unit + 2].tolist()
            held = slot_rows[row, head, :length]
            slots = ((held >= begin) & (held < end)).nonzero().flatten()
            centroids[row, head, unit] = keys[row, head, slots].mean(0)
            first = 0
            for block in pool:
                here = held[slots] - first
                inside = (here >= 0) & (here < block.shape[2])
                parts = [x[row, head, slots[inside]] for x in (k, v)]
                if words is None:
                    rows = torch.cat(parts, 1).view(-1, *block.shape[3:])
                else:
                    rows = packed(*parts, words[row, head, slots[inside]])
                block[row, head, here[inside].to(block.device)] = rows.to(block.device)
                first += block.shape[2]


def fake(k, *rest):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(
        k,
        v,
        slot_rows,
        seq_lens,
        starts,
        num_units,
        closed,
        pool,
        centroids,
        words=None,
        turned=False,
    ):
        inputs = k, v, slot_rows, seq_lens, starts, num_units, closed, pool, centroids
        extension.store_segments(backend, *inputs, words, turned, raw_stream(k))

    return run


_op = bind(
    "store_segments",
    "(Tensor k, Tensor v, Tensor slot_rows, Tensor seq_lens, Tensor starts, Tensor num_units,"
    " Tensor closed, Tensor(a!)[] pool, Tensor(b!) centroids, Tensor? words=None,"
    " bool turned=False) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
