"""compact_kv: remove tokens from a cache in place."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def compact_kv(
    k: Tensor, v: Tensor, state: list[Tensor], victims: Tensor, seq_lens: Tensor
) -> None:
    """Remove the victims of each row by moving its last surviving tokens into their slots.

    A row of m tokens that loses c has m - c afterwards. The i-th survivor at or above slot m - c
    moves to the i-th victim below it. This copies at most c rows per head, needs no second buffer
    and moves nothing else. The contents of slots m - c and above are unspecified afterwards.

    Args:
        k, v: [B, H, T, D] of the same dtype, any dtype, changed in place; strided over B, H and T.
            Their D may differ, and V's be 0.
        state: at most 8 tensors [B, U or H, T'] of 4-byte elements, T' >= seq_lens, strided over B
            and U. Their elements move with the tokens. The scales of 8-bit K and V are one of them.
        victims: [B, U, V] int32 slots, ascending, then -1; U is 1 (all heads alike) or H. All units
            of a row must lose the same number of tokens.
        seq_lens: [B] int32, tokens in each row before.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also victims out of
            range or order, or unequal counts in a row. Nothing is changed in that case.
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
                for each in mine if tensor.shape[1] == heads else [unit]:
                    tensor[b, each, holes] = tensor[b, each, movers]


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
