"""select_pages: select the best pages of each sequence; recent and sink pages always count."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    num_pages: int,
    *,
    num_recent: int = 1,
    num_sink: int = 0,
    table: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the `num_pages` best pages of each row by score, in ascending order, in the form that
    `decode_attention` takes.

    A row has ceil(seq_lens / page_size) pages. The last `num_recent` pages (a partial page counts)
    and the first `num_sink` pages are always selected and count towards `num_pages`. The others
    compete by score; the older page wins ties, and NaN ranks last. A row with at most `num_pages`
    pages keeps them all, and the rest of its list is -1.

    Args:
        scores: [B, H, P] fp32, H = 1 (one set for all heads) or Hkv.
        seq_lens: [B] int32 tokens in each row, at most P * page_size.
        page_size: tokens in a page.
        num_pages: K, pages in the set.
        num_recent: at least 1, so that the partial page is always listed, and last.
        num_sink: first pages that are always selected; num_recent + num_sink <= num_pages.
        table: [B, N] or [B, 1 or H, N] int32, N >= P: an engine's block table, whose columns the
            scores belong to.
        pages: [B, H, K] int32, contiguous, with `table`: written, the entries of the selected
            columns, -1 behind the last.

    Returns:
        page_ids [B, H, K] int32 and selected_lens [B] int32, the tokens in a row's set. Pass it to
        `decode_attention` as `seq_lens`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; or invalid counts.
    """
    return _op(scores, seq_lens, page_size, num_pages, num_recent, num_sink, table, pages)


def reference(scores, seq_lens, page_size, num_pages, num_recent, num_sink, table=None, pages=None):
    total = scores.shape[-1]
    if total < num_pages:  # so that there are num_pages columns to choose from
        scores = torch.nn.functional.pad(scores, (0, num_pages - total))
        total = num_pages
    used = -(-seq_lens.long() // page_size)  # [B] pages of each row
    page = torch.arange(total, device=scores.device)
    exists = page < used[:, None, None]
    forced = (page >= used[:, None, None] - num_recent) | (page < num_sink)
    ranking = scores.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # Three classes, then score, then age: a stable sort of (class, score) keeps the older page.
    order = ranking.argsort(dim=-1, descending=True, stable=True)
    tier = (exists.long() + (exists & forced).long()).expand_as(order).gather(-1, order)
    order = order.gather(-1, tier.argsort(dim=-1, descending=True, stable=True))[..., :num_pages]
    kept = order.where(order < used[:, None, None], total).sort(-1).values
    page_ids = kept.where(kept < total, -1).int()
    if pages is not None:
        pages.copy_(entries(table, page_ids))
    last_page = seq_lens - (used - 1) * page_size
    full = (num_pages - 1) * page_size + last_page
    return page_ids, torch.where(used > num_pages, full, seq_lens).int()


def entries(table: Tensor, columns: Tensor) -> Tensor:
    """[B, H, K] entries of table [B, N] or [B, 1 or H, N] at columns [B, H, K]; -1 for -1."""
    lists = (table if table.ndim == 3 else table[:, None]).expand(-1, columns.shape[1], -1)
    missing = lists.shape[-1]
    lists = torch.nn.functional.pad(lists, (0, 1), value=-1)
    return lists.gather(-1, columns.long().where(columns >= 0, missing))


def fake(scores, seq_lens, page_size, num_pages, num_recent, num_sink, table=None, pages=None):
    page_ids = scores.new_empty(scores.size(0), scores.size(1), num_pages, dtype=torch.int32)
    return page_ids, torch.empty_like(seq_lens)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(scores, seq_lens, page_size, num_pages, num_recent, num_sink, table=None, pages=None):
        page_ids, selected_lens = fake(
            scores, seq_lens, page_size, max(num_pages, 0), num_recent, num_sink
        )
        extension.select_pages(
            backend,
            scores,
            seq_lens,
            page_ids,
            selected_lens,
            page_size,
            num_recent,
            num_sink,
            table,
            pages,
            raw_stream(scores),
        )
        return page_ids, selected_lens

    return run


_op = bind(
    "select_pages",
    "(Tensor scores, Tensor seq_lens, int page_size, int num_pages, int num_recent, int num_sink,"
    " Tensor? table=None, Tensor(a!)? pages=None)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
