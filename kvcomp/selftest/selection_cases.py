"""Cases of the ops that score pages by logits and select them."""

from __future__ import annotations

import torch

from kvcomp.selftest.case import HALF_LOGITS, Case, generator_for, on, scored_logits


def selection_cases() -> list[Case]:
    return [*_page_scores_cases(), *_select_pages_cases()]


def _page_scores_cases() -> list[Case]:
    def build(name, batch, heads, slots, page_size, groups=1, use_max=True, spare=0, half=False):
        def make(dtype, device):
            logits, lse, lens = scored_logits(batch, heads, slots, generator_for(name), spare)
            logits = logits.half() if half else logits
            return on(device, logits, lse, lens, page_size, groups, use_max)

        return Case("page_scores", name, make, refused_by=HALF_LOGITS if half else ())

    def empty_row(dtype, device):
        logits, lse, lens = scored_logits(2, 4, 50, generator_for("empty"))
        lens[0], lse[0], logits[0] = 0, -torch.inf, torch.nan
        return on(device, logits, lse, lens, 16, 1, True)

    def all_masked(dtype, device):
        """A row whose pages were all holes: its logits and lse are -inf, its scores 0."""
        logits, lse, lens = scored_logits(2, 4, 50, generator_for("masked"))
        logits[0], lse[0] = -torch.inf, -torch.inf
        return on(device, logits, lse, lens, 16, 2, True)

    return [
        build("one-token", 1, 1, 1, 16),
        build("max", 3, 8, 333, 16),
        build("max-groups", 2, 12, 130, 16, groups=3),
        build("sum", 2, 8, 129, 32, use_max=False),
        build("sum-groups-tokens", 2, 8, 60, 1, groups=4, use_max=False),
        build("strided", 2, 7, 257, 64, spare=31),
        build("many-heads-long", 1, 40, 4100, 16),
        build("half", 2, 8, 340, 16, half=True),
        build("half-odd-sum", 2, 7, 257, 64, groups=7, use_max=False, half=True),
        Case("page_scores", "empty-row", empty_row),
        Case("page_scores", "all-masked", all_masked),
    ]


def _select_pages_cases() -> list[Case]:
    def build(name, batch, heads, lens, page_size, count, recent=1, sink=0, ties=False):
        def make(dtype, device):
            generator = generator_for(name)
            lens_ = torch.tensor(lens, dtype=torch.int32)
            pages = -(-max(max(lens), 1) // page_size)
            scores = torch.rand(batch, heads, pages, generator=generator)
            if ties:
                scores = (scores * 3).floor()
                scores[..., ::5] = torch.nan
            return on(device, scores, lens_, page_size, count, recent, sink)

        return Case("select_pages", name, make)

    return [
        build("one", 1, 1, [1], 16, 1),
        build("ragged", 3, 1, [700, 16, 333], 16, 9, recent=2),
        build("per-head-sinks", 2, 4, [900, 255], 16, 12, recent=3, sink=2),
        build("ties-and-nan", 2, 2, [640, 600], 16, 20, ties=True),
        build("fits", 2, 1, [90, 31], 16, 8),
        build("empty-row", 2, 1, [0, 100], 16, 4),
        build("tokens", 1, 2, [513], 1, 100, recent=8, sink=4),
        build("long", 1, 1, [65536], 16, 128, recent=8),
        build("many-pages-tied", 1, 2, [4999], 1, 4000, recent=3, sink=1, ties=True),
    ]
