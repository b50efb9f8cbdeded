"""fetch_rows: copy the selected rows that the slots lack from the host pool."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops.quantize_rows import unpacked


def fetch_rows(
    k: Tensor,
    v: Tensor,
    slot_rows: Tensor,
    seq_lens: Tensor,
    rows: Tensor,
    first_local: Tensor,
    active: Tensor,
    pool: list[Tensor],
    *,
    num_sinks: int = 0,
    words: Tensor | None = None,
) -> Tensor:
    """Exchange the contents of each sequence's slots: afterwards they hold the sinks, the local
    rows and the wanted rows.

    slot_rows says which pool row each slot of [0, seq_lens) holds. A slot is kept if its row is
    below num_sinks, at or above first_local, or wanted. Wanted rows that no slot holds are copied
    from the pool in ascending order, first into the lowest free slots, then behind the last slot.
    Free slots that remain are filled with the last survivors, as in `compact_kv`. seq_lens and
    slot_rows are updated; released slots become 0 in slot_rows.

    Args:
        k, v: [B, H, T, D] of the same dtype: fp32, fp16 or bf16; any strides on B, H and T, D
            contiguous, a multiple of 16 and at most 1024; changed in place. V has D columns, or
            without `words` any such number, or 0.
        slot_rows: [B, H, T'] int32, contiguous in the last dimension, distinct over a head's valid
            slots; changed in place.
        seq_lens: [B] int32, changed in place; all heads of a row must end with the same length.
        rows: [B, H, K] int32, contiguous: the wanted rows, num_sinks <= row < first_local,
            ascending, then -1.
        first_local: [B] int32, at most the pool's rows.
        active: [B] int32, 0 for sequences to leave unchanged.
        pool: blocks [B, H, R, 2, D] of k's dtype in host memory, as for `store_segments`.
        num_sinks: pool rows [0, num_sinks) always stay.
        words: [B, H, T'] int32, the scales of int8 k and v, changed in place; blocks are then
            [B, H, R, 2 D + 16] int8, as for `store_segments`.

    Returns:
        fetched [B, H] int32: rows copied from the pool.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also rows out of
            range or order, heads that would differ in length, or too few slots. Nothing is changed
            in that case.
    """
    return _op(k, v, slot_rows, seq_lens, rows, first_local, active, pool, num_sinks, words)


def reference(k, v, slot_rows, seq_lens, rows, first_local, active, pool, num_sinks, words=None):
    moved = (k, v) if words is None else (k, v, words)
    fetched = torch.zeros(k.shape[:2], dtype=torch.int32, device=k.device)
    for row in active.nonzero().flatten().tolist():
        length = int(seq_lens[row])
        for head in range(k.shape[1]):
            held, wanted = slot_rows[row, head], rows[row, head]
            wanted = wanted[wanted >= 0]
            resident = held[:length].clone()
            kept = (resident < num_sinks) | (resident >= first_local[row])
            kept |= torch.isin(resident, wanted)
            missing = wanted[~torch.isin(wanted, resident)]
            free = (~kept).nonzero().flatten()
            slots = torch.cat([free, torch.arange(length, length + len(missing), device=k.device)])
            into = slots[: len(missing)]
            pieces = torch.cat([block[row, head] for block in pool])
            pieces = pieces[missing.to(pieces.device)].to(k.device)
            if words is None:
                parts = pieces.flatten(1).split((k.shape[-1], v.shape[-1]), 1)
            else:
                parts = unpacked(pieces)
            for tensor, value in zip(moved, parts, strict=True):
                tensor[row, head, into] = value
            held[into] = missing
            fetched[row, head] = len(missing)
            holes = free[len(missing) :]
            end = max(length, length + len(missing) - len(free))
            new_length = length + len(missing) - len(free)
            tail = torch.arange(new_length, end, device=k.device)
            movers = tail[~torch.isin(tail, holes)]
            holes = holes[holes < new_length]
            for tensor in (*moved, slot_rows):
                tensor[row, head, holes] = tensor[row, head, movers]
            held[new_length:length] = 0
        seq_lens[row] = new_length
    return fetched


def fake(k, v, slot_rows, seq_lens, rows, first_local, active, pool, num_sinks, words=None):
    return seq_lens.new_empty(k.shape[:2], dtype=torch.int32)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(k, v, slot_rows, seq_lens, rows, first_local, active, pool, num_sinks, words=None):
        fetched = fake(k, v, slot_rows, seq_lens, rows, first_local, active, pool, num_sinks)
        extension.fetch_rows(
            backend,
            k,
            v,
            slot_rows,
            seq_lens,
            rows,
            first_local,
            active,
            pool,
            fetched,
            num_sinks,
            words,
            raw_stream(k),
        )
        return fetched

    return run


_op = bind(
    "fetch_rows",
    "(Tensor(a!) k, Tensor(b!) v, Tensor(c!) slot_rows, Tensor(d!) seq_lens, Tensor rows,"
    " Tensor first_local, Tensor active, Tensor[] pool, int num_sinks, Tensor(e!)? words=None)"
    " -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
