"""append_rows: K and V of new tokens behind the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind


def append_rows(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    logical_lens: Tensor | None = None,
    words: Tensor | None = None,
    words_cache: Tensor | None = None,
    added: Tensor | None = None,
) -> None:
    """Write m new tokens of each sequence behind its last one, and count them.

    A decode step appends to every layer. In torch that takes an indexed assignment for K, one for V
    and a sum for each length, because sequences are of different lengths.

    Args:
        k, v: [B, H, m, D] and [B, H, m, Dv] of one dtype: fp32, fp16, bf16, or int8 for codes; any
            strides. Dv may be 0.
        k_cache, v_cache: [B, H, T, D] and [B, H, T, Dv] of the same dtype, any strides but those of
            the last dimension, written. They share no element.
        seq_lens: [B] int32, tokens of each sequence, which grow by what comes.
        logical_lens: [B] int32, another count of tokens that grows alike; None: there is none.
        words, words_cache: [B, H, m] and [B, H, T] int32, the scales of codes; None: no codes.
        added: [B] int32, how many tokens a sequence gets: the first of the m. None: all.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; tokens without room. Nothing is
            written then.
    """
    _op(k, v, k_cache, v_cache, seq_lens, logical_lens, words, words_cache, added)


def reference(
    k, v, k_cache, v_cache, seq_lens, logical_lens=None, words=None, words_cache=None, added=None
):
    step = torch.arange(k.shape[2], device=k.device)
    counts = torch.full_like(seq_lens, k.shape[2]) if added is None else added
    row, new = (step < counts[:, None]).nonzero(as_tuple=True)
    slot = seq_lens.long()[row] + new
    for cache, rows in (k_cache, k), (v_cache, v), (words_cache, words):
        if cache is not None:
            cache[row, :, slot] = rows[row, :, new]
    seq_lens += counts
    if logical_lens is not None:
        logical_lens += counts


def fake(
    k, v, k_cache, v_cache, seq_lens, logical_lens=None, words=None, words_cache=None, added=None
):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(
        k,
        v,
        k_cache,
        v_cache,
        seq_lens,
        logical_lens=None,
        words=None,
        words_cache=None,
        added=None,
    ):
        extension.append_rows(
            backend, k, v, k_cache, v_cache, seq_lens, logical_lens, words, words_cache, added, 0
        )

    return run


_op = bind(
    "append_rows",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) seq_lens,"
    " Tensor(d!)? logical_lens=None, Tensor? words=None, Tensor(e!)? words_cache=None,"
    " Tensor? added=None) -> ()",
    reference=reference,
    fake=fake,
    native=native,
)
