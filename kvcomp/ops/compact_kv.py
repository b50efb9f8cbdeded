"""compact_kv: take tokens out of a cache in place."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def compact_kv(
    k: Tensor, v: Tensor, state: list[Tensor], victims: Tensor, seq_lens: Tensor
) -> None:
    """Fill the holes that victims leave with the last surviving tokens of the row.

    A row of m tokens that loses c has m - c afterwards: the i-th victim below slot m - c receives
    the i-th survivor at or above it. That is at most c row copies per head, no second buffer, and
    nothing else moves. What lies at m - c and above is unspecified afterwards.

    Args:
        k, v: [B, H, T, D] of any one dtype, changed in place; strided over B, H and T.
        state: tensors [B, U, T'] of 4-byte elements that follow their tokens, T' >= seq_lens;
            strided over B and U. At most 8, or none.
        victims: [B, U, V] int32 slots, ascending, then -1; U is 1 (all heads alike) or H. The units
            of a row lose equally many.
        seq_lens: [B] int32, tokens in each row before.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also victims out of
            range or order, or unequal counts in a row. Nothing has been changed then.
    """
    _op(k, v, state, victims, seq_lens)


def reference(k, v, state, victims, seq_lens):
    heads = k.shape[1]
    for b in range(victims.shape[0]):
        for unit in range(victims.shape[1]):
            gone = victims[b, unit][victims[b, unit] >= 0].long()
            length = int(seq_lens[b])
            kept = length - len(gone)
            tail = torch.arange(kept, length, device=victims.device)
            movers = tail[~torch.isin(tail, gone)]
            holes = gone[gone < kept]
            mine = range(heads) if victims.shape[1] == 1 else [unit]
            for head in mine:
                k[b, head, holes] = k[b, head, movers]
                v[b, head, holes] = v[b, head, movers]
            for tensor in state:
                tensor[b, unit, holes] = tensor[b, unit, movers]


def fake(k, v, state, victims, seq_lens):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(k, v, state, victims, seq_lens):
        extension.compact_kv(backend, k, v, state, victims, seq_lens, raw_stream(k))

    return run


_op = bind(
    "compact_kv",
    "(Tensor(a!) k, Tensor(b!) v, Tensor(c!)[] state, Tensor victims, Tensor seq_lens) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
