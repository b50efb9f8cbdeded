"""append_attention: the newest tokens of each sequence over its cache, which holds them already."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp import _C
from kvcomp.ops._arguments import default_scale
from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops.decode_attention import (
    NO_BOUND,
    attended,
    decoded,
    given_or_made,
    handed_over,
    listed,
    logits_of,
    optionals,
    partials,
    room,
)

MOST_QUERIES = 64  # bits of a mask


def append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    tail: Tensor | None = None,
    page_ids: Tensor | None = None,
    page_size: int = 1,
    scale: float | None = None,
    logits: Tensor | None = None,
    words: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float | None = None,
    max_len: int | None = None,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the last m tokens of each sequence: a second turn, a piece of a prompt, the
    drafts that speculative decoding checks. K and V are read once for all of them.

    As `decode_attention` for m queries that share one list of tokens. The last m of these are the
    queries' own, the new tokens. Every query sees all tokens before them; of the new ones query i
    sees the first i + 1 (causal), or what its row of `tail` says, which can hold a tree of drafts.

    A query gets what `decode_attention` gives it, alone after the tokens that it sees. On the CPU
    that is so to the last bit, whatever else is in the batch and however many threads work; the
    CUDA kernel gives the same bits where it divides the tokens alike, which depends on their
    number and not on m.

    Args:
        q: [B, m, Hq, D], 1 <= m <= 64; fp32, fp16 or bf16; D one of `HEAD_SIZES`.
        k, v: [B, Hkv, T, D] of q's dtype, or int8 with `words`; any strides on B, Hkv and T, D
            contiguous. Or a pool [pages, Hkv, P, D], see `decode_attention`.
        seq_lens: [B] int32, tokens attended, the new ones included.
        q_lens: [B] int32, how many of its m queries a row has, in front; it has as many new
            tokens. The queries behind give 0 and -inf. None: all m.
        tail: [B, m] int64. Bit j of query i says whether it sees the j-th new token, itself
            included. None: causal.
        page_ids: [B, 1, K] (one set for all heads) or [B, Hkv, K], int32; [B, K] with a pool: the
            list of tokens as in `decode_attention`. The pages of the new tokens are in it, last.
        page_size: tokens in a page.
        scale: factor on q k^T; 1 / sqrt(D) by default.
        logits: optional output [B, m, Hq, N], N >= T (dense) or K * page_size (paged), of fp32 or,
            except on the CPU, fp16: receives the scaled logits of each attended position; others
            are left alone or set to -inf. See `decode_attention`.
        words: [B, Hkv, T] int32, scales of int8 k and v, as for `decode_attention`.
        out, lse: where to write the results, contiguous; new tensors by default.
        softcap: of the logits, as for `decode_attention`.
        max_len, checked: as for `decode_attention`.

    Returns:
        out [B, m, Hq, Dv] of q's dtype, and lse [B, m, Hq] fp32, the natural log of the sum of exp.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout. Values of lengths and lists
            are checked on the CPU; on a GPU, where reading them would stall, what cannot be gives
            NaN.

    Source:
        grouped queries as rows of one tile: FlashAttention-3 (2407.08608); the mask of a tree of
        drafts: SpecInfer (2305.09781), section 4.2.
    """
    if scale is None:
        scale = default_scale(q)
    made = _op(
        *(q, k, v, seq_lens, q_lens, tail, page_ids, page_size, scale, logits),
        *(words, out, lse, 0.0 if softcap is None else softcap),
        *(NO_BOUND if max_len is None else max_len, checked),
    )
    return given_or_made(out, lse, made)


def reference(q, k, v, seq_lens, q_lens, tail, page_ids, page_size, scale, logits, *optional):
    words, out, lse, softcap, _, _ = optionals(*optional)
    count = q.shape[1]
    q, k, v = decoded(q, k, v, words)
    k, v, valid = listed(k, v, seq_lens, page_ids, page_size)
    seen = visible(seq_lens, q_lens, tail, count, k.shape[2])
    allowed = seen[:, :, None] & valid[:, None]  # [B, m, 1 or Hkv, N]
    x = logits_of(q, k, scale, softcap).masked_fill(~allowed[..., None, :], -torch.inf)
    if logits is not None:
        logits[..., : x.shape[-1]] = x.flatten(2, 3)
    return handed_over(attended(x, v), out, lse)


def visible(seq_lens, q_lens, tail, count, positions):
    """[B, m, N] bool: which positions each query may see, as far as there are tokens."""
    query = torch.arange(count, device=seq_lens.device)[:, None]
    lens = torch.full_like(seq_lens, count) if q_lens is None else q_lens
    position = torch.arange(positions, device=seq_lens.device)
    new = (position - (seq_lens - lens)[:, None])[:, None]  # [B, 1, N], the first new one is 0
    of_new = new <= query if tail is None else (tail[..., None] >> new.clamp(0, 63)) & 1 == 1
    return ((new < 0) | of_new) & (query < lens[:, None, None])


def fake(q, k, v, seq_lens, q_lens, tail, page_ids, page_size, scale, logits, *optional):
    _, out, lse, *_ = optionals(*optional)
    return room(q, v, out, lse)


def native(extension: ModuleType, backend: int) -> Callable:
    in_splits = backend == _C.Backend.cuda

    def run(q, k, v, seq_lens, q_lens, tail, page_ids, page_size, scale, logits, *optional):
        words, out, lse, softcap, max_len, checked = optionals(*optional)
        made = room(q, v, out, lse)
        out, lse = given_or_made(out, lse, made)
        partial_out, partial_lse, size = None, None, 0
        if in_splits:
            partial_out, partial_lse, size = partials(q, k, v, lse, page_ids, page_size, max_len)
        extension.append_attention(
            *(backend, q, k, v, seq_lens, q_lens, tail, page_ids),
            *(logits, out, lse, page_size, scale),
            *(partial_out, partial_lse, size, words, softcap, max_len, checked, raw_stream(q)),
        )
        return made

    return run


_op = bind(
    "append_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor seq_lens, Tensor? q_lens, Tensor? tail,"
    " Tensor? page_ids, int page_size, float scale, Tensor(a!)? logits, Tensor? words=None,"
    " Tensor(b!)? out=None, Tensor(c!)? lse=None, float softcap=0.0,"
    f" int max_len={NO_BOUND}, bool checked=False) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
