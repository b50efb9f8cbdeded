"""attend_and_select: attention over all tokens, and the pages that matter most in it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp import _C
from kvcomp.ops._arguments import default_scale
from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops.decode_attention import NO_BOUND, given_or_made, optionals, partials, room
from kvcomp.ops.decode_attention import reference as attend
from kvcomp.ops.page_scores import is_max
from kvcomp.ops.page_scores import reference as score
from kvcomp.ops.select_pages import reference as select


def attend_and_select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    page_size: int,
    num_pages: int,
    *,
    logits: Tensor,
    page_ids: Tensor | None = None,
    scale: float | None = None,
    num_groups: int = 1,
    reduction: str = "max",
    num_recent: int = 1,
    num_sink: int = 0,
    words: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float | None = None,
    max_len: int | None = None,
    checked: bool = False,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`decode_attention`, `page_scores` of its logits and `select_pages` by these scores in one op.

    A layer that selects pages for the layers above it needs all three. In CUDA this takes two
    launches (four beyond 2048 pages), and the host does not wait between them.

    Args:
        q, k, v, seq_lens, page_ids, scale, words, out, lse, softcap, max_len, checked: as for
            `decode_attention`. With `page_ids` the selected ids are positions in that list (columns
            of a block table), and an entry of -1 before a row's end gets no score.
        page_size: tokens in a page, also in a page of `page_ids`.
        num_pages: K, pages in a set.
        logits: [B, Hq, N] fp32, or fp16 except on the CPU, N >= T (dense) or K' * page_size (K'
            listed pages): output, the scaled logits as from `decode_attention`.
        num_groups, reduction: as for `page_scores`. Each group gets its own set.
        num_recent, num_sink: as for `select_pages`.
        pages: [B, num_groups, K] int32, contiguous, with `page_ids`: written, the entries of that
            list which are selected, -1 behind the last.

    Returns:
        out [B, Hq, D] of q's dtype, lse [B, Hq] fp32, scores [B, num_groups, P] fp32 with
        P = ceil(T / page_size) or K', selected_ids [B, num_groups, K] int32, and selected_lens [B]
        int32, the tokens in a row's set.

    Raises:
        TypeError, ValueError: in the same cases as the three ops.
    """
    use_max = is_max("attend_and_select", reduction)
    if scale is None:
        scale = default_scale(q)
    made = _op(
        *(q, k, v, seq_lens, page_ids, page_size, num_pages, scale, logits),
        *(num_groups, use_max, num_recent, num_sink),
        *(words, out, lse, 0.0 if softcap is None else softcap),
        *(NO_BOUND if max_len is None else max_len, checked, pages),
    )
    return given_or_made(out, lse, made)


def in_turn(attend: Callable, score: Callable, select: Callable) -> Callable:
    """The op built from an implementation of each of the three."""

    def run(q, k, v, seq_lens, page_ids, page_size, num_pages, scale, logits, *rest):
        num_groups, use_max, num_recent, num_sink, *optional = rest
        pages = optional.pop() if len(optional) > len(optionals()) else None
        made = attend(q, k, v, seq_lens, page_ids, page_size, scale, logits, *optional)
        _, out, lse, *_ = optionals(*optional)
        _, lse = given_or_made(out, lse, made)
        positions = k.size(2) if page_ids is None else page_ids.size(-1) * page_size
        written = logits.narrow(2, 0, positions)
        scores = score(written, lse, seq_lens, page_size, num_groups, use_max)
        counts = page_size, num_pages, num_recent, num_sink
        table = None if pages is None else page_ids
        return *made, scores, *select(scores, seq_lens, *counts, table, pages)

    return run


reference = in_turn(attend, score, select)


def fake(q, k, v, seq_lens, page_ids, page_size, num_pages, scale, logits, *rest):
    num_groups, (_, out, lse, *_) = rest[0], optionals(*rest[4:10])
    # Sizes and shapes that make no sense reach the native checks, which say so.
    out, lse = room(q, v, out, lse)
    if page_ids is None:
        total = -(-k.size(2) // max(page_size, 1)) if k.ndim > 2 else 0
    else:
        total = page_ids.size(-1) if page_ids.ndim > 1 else 0
    sets = q.size(0), max(num_groups, 0)
    selected_ids = seq_lens.new_empty(*sets, max(num_pages, 0), dtype=torch.int32)
    return out, lse, lse.new_empty(*sets, total), selected_ids, torch.empty_like(seq_lens)


def native(extension: ModuleType, backend: int) -> Callable:
    in_splits = backend == _C.Backend.cuda

    def run(q, k, v, seq_lens, page_ids, page_size, num_pages, scale, logits, *rest):
        made = fake(q, k, v, seq_lens, page_ids, page_size, num_pages, scale, logits, *rest)
        words, out, lse, softcap, max_len, checked = optionals(*rest[4:10])
        (pages,) = rest[10:] or (None,)
        outputs = given_or_made(out, lse, made)
        lse = outputs[1]
        partial_out, partial_lse, size, arrived = None, None, 0, None
        if in_splits:
            partial_out, partial_lse, size = partials(q, k, v, lse, page_ids, page_size, max_len)
            arrived = seq_lens.new_empty(lse.shape, dtype=torch.int32)
        extension.attend_and_select(
            *(backend, q, k, v, seq_lens, page_ids, logits, *outputs, page_size, scale, *rest[:4]),
            *(partial_out, partial_lse, size, arrived),
            *(words, softcap, max_len, checked, pages, raw_stream(q)),
        )
        return made

    return run


_op = bind(
    "attend_and_select",
    "(Tensor q, Tensor k, Tensor v, Tensor seq_lens, Tensor? page_ids, int page_size,"
    " int num_pages, float scale, Tensor(a!) logits, int num_groups, bool use_max, int num_recent,"
    " int num_sink, Tensor? words=None, Tensor(b!)? out=None, Tensor(c!)? lse=None,"
    f" float softcap=0.0, int max_len={NO_BOUND}, bool checked=False, Tensor(d!)? pages=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
