"""Cases per op: the inputs that tests run on every implementation, small, odd and nasty.

A case makes the positional arguments of the op's schema. Floating inputs have the spread of real
attention (a few tokens hold most of the mass), lengths are ragged and odd, K and V come in the
layouts that caches have, and every table of cases holds length 1 and rows with nothing valid.
"""

from __future__ import annotations

import math

import torch

from kvcomp.testing.case import (
    HALF_AND_FULL,
    Case,
    attention_inputs,
    generator_for,
    ints,
    kv_cache,
    on,
)
from kvcomp.testing.retrieval_cases import retrieval_cases

HALF_LOGITS = ("cpu",)  # who does not take them


def _dense(name, batch, heads, kv_heads, slots, dim, lens, layout="head", logits=None, sharpness=1):
    def make(dtype, device):
        q, k, v = attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout)
        buffer = _room(batch, heads, slots + 3, dtype=logits)
        lens_ = torch.tensor(lens, dtype=torch.int32)
        return on(device, q, k, v, lens_, None, 1, dim**-0.5 * sharpness, buffer)

    return _attention_case(name, make, logits)


def _paged(
    name,
    batch,
    heads,
    kv_heads,
    slots,
    dim,
    page_size,
    count,
    shared,
    layout="head",
    holes=False,
    logits=None,
):
    def make(dtype, device):
        q, k, v = attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout)
        generator = generator_for(name)
        pages = slots // page_size
        sets = torch.rand(batch, 1 if shared else kv_heads, pages, generator=generator)
        page_ids = sets.argsort(-1)[..., :count].sort(-1).values.int()
        lens = torch.randint(1, count * page_size + 1, (batch,), generator=generator).int()
        lens[-1] = count * page_size
        if holes:
            page_ids[:, :, ::3] = -1
            page_ids[0] = -1  # a row of holes attends to nothing
        buffer = _room(batch, heads, count * page_size, dtype=logits)
        return on(device, q, k, v, lens, page_ids, page_size, dim**-0.5, buffer)

    return _attention_case(name, make, logits)


def _room(*shape, dtype) -> torch.Tensor | None:
    """Unwritten logits; None where no dtype asks for them."""
    return None if dtype is None else torch.full(shape, torch.nan, dtype=dtype)


def _attention_case(name, make, logits) -> Case:
    def unattended(args):
        args[7][~args[7].isfinite()] = 0  # left alone or -inf
        if half:
            args[7].clamp_(-65504, 65504)  # of fp16

    if logits is None:
        return Case("decode_attention", name, make, HALF_AND_FULL)
    half = logits == torch.float16
    refused_by = HALF_LOGITS if half else ()
    return Case("decode_attention", name, make, HALF_AND_FULL, (7,), unattended, refused_by)


def _decode_attention_cases() -> list[Case]:
    dense = [
        _dense("one-token", 1, 1, 1, 1, 64, [1]),
        _dense("odd-ragged", 3, 8, 2, 131, 64, [131, 1, 77]),
        _dense("empty-row", 2, 4, 4, 40, 32, [0, 39]),
        _dense("group7-token-major", 2, 14, 2, 203, 128, [203, 64], layout="token"),
        _dense("slab", 2, 4, 1, 65, 80, [65, 33], layout="slab"),
        _dense("dim96", 1, 3, 3, 50, 96, [47]),
        _dense("dim256", 1, 4, 2, 70, 256, [70]),
        _dense("long-row", 1, 4, 2, 5003, 64, [5001]),
        _dense("group20", 1, 20, 1, 37, 64, [35], logits=torch.float32),
        _dense("crooked", 2, 4, 2, 70, 80, [66, 70], layout="crooked"),
        _dense("logits", 2, 6, 2, 150, 64, [150, 9], logits=torch.float32),
        _dense("half-logits", 2, 6, 2, 150, 64, [150, 9], logits=torch.float16),
        _dense("half-logits-clamped", 1, 6, 2, 40, 64, [37], logits=torch.float16, sharpness=1e5),
    ]
    paged = [
        _paged("tokens-per-head", 2, 8, 2, 200, 64, 1, 37, shared=False),
        _paged("tokens-shared", 2, 4, 2, 90, 32, 1, 20, shared=True, layout="token"),
        _paged("pages16-shared", 2, 8, 4, 330, 128, 16, 6, shared=True),
        _paged("pages16-per-head", 2, 6, 3, 200, 64, 16, 5, shared=False, layout="slab"),
        _paged("pages32-holes", 3, 4, 2, 260, 64, 32, 5, shared=False, holes=True),
        _paged("pages64-logits", 2, 4, 1, 400, 80, 64, 3, shared=True, logits=torch.float32),
        _paged("holes-half-logits", 3, 4, 2, 90, 64, 16, 5, False, "head", True, torch.float16),
    ]
    return dense + paged


def _merge_states_cases() -> list[Case]:
    def build(name, batch, heads, dim, empty):
        def make(dtype, device):
            generator = generator_for(name)
            outs = [torch.randn(batch, heads, dim, generator=generator).to(dtype) for _ in "ab"]
            lses = [torch.randn(batch, heads, generator=generator) * 4 for _ in "ab"]
            if empty:
                lses[0][0] = lses[1][0] = -torch.inf  # both sides empty: neutral again
                lses[1][1:, 0] = -torch.inf
                outs[0][0] = outs[1][0] = 0
            return on(device, outs[0], lses[0], outs[1], lses[1])

        return Case("merge_states", name, make, HALF_AND_FULL)

    return [
        build("one", 1, 1, 32, False),
        build("odd", 3, 7, 80, False),
        build("empty-sides", 3, 4, 64, True),
    ]


def scored_logits(batch, heads, slots, generator, spare=0):
    """Logits [B, Hq, N] and the lse of their valid part, given seq_lens chosen here."""
    lens = torch.randint(1, slots + 1, (batch,), generator=generator).int()
    lens[-1] = slots
    logits = torch.randn(batch, heads, slots + spare, generator=generator) * 3
    valid = torch.arange(slots + spare) < lens[:, None, None]
    lse = logits.masked_fill(~valid, -torch.inf).logsumexp(-1)
    logits = logits.masked_fill(~valid, torch.nan)  # what lies past the end must not be read
    return logits, lse, lens


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


def _attend_and_select_cases() -> list[Case]:
    def build(
        name,
        lens,
        heads,
        kv_heads,
        slots,
        dim,
        page_size,
        count,
        recent=1,
        sink=0,
        groups=1,
        use_max=True,
        layout="head",
        listed=0,
        half=False,
    ):
        def make(dtype, device):
            batch = len(lens)
            q, k, v = attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout)
            if half:  # logits that fp16 holds exactly, so that the scores are the reference's
                q, k = q.round(), k.round()
            page_ids, room = None, slots
            if listed:  # a block table, the pages in any order
                order = torch.rand(batch, 1, slots // page_size, generator=generator_for(name))
                page_ids, room = order.argsort(-1)[..., :listed].int(), listed * page_size
            logits = _room(batch, heads, room + 4, dtype=torch.float16 if half else torch.float32)
            choice = groups, use_max, recent, sink
            return on(
                *(device, q, k, v, ints(lens), page_ids, page_size, count, dim**-0.5, logits),
                *choice,
            )

        refused_by = HALF_LOGITS if half else ()
        return Case("attend_and_select", name, make, HALF_AND_FULL, (8,), unattended, refused_by)

    def unattended(args):
        args[8][~args[8].isfinite()] = 0  # left alone or -inf

    return [
        build("one-token", [1], 1, 1, 1, 64, 16, 1),
        build("one-page", [5, 0, 9], 4, 2, 9, 32, 16, 3),
        build("one-split", [103, 17], 8, 2, 103, 64, 16, 3, recent=2),
        build("splits", [601, 300], 6, 2, 601, 64, 16, 9, recent=3, sink=2),
        build("fits", [90, 31, 0], 4, 4, 96, 80, 16, 8, recent=8),
        build("sets-by-mass", [301, 9], 6, 2, 301, 32, 4, 20, 2, groups=2, use_max=False),
        build("tokens", [290, 133], 20, 1, 290, 64, 1, 90, recent=8, sink=4, layout="token"),
        build("table", [150, 77], 8, 2, 320, 64, 16, 6, listed=10),
        build("many-heads", [100], 18, 6, 100, 128, 32, 2, layout="slab"),
        build("half-logits", [600, 301], 6, 2, 600, 64, 16, 9, recent=3, sink=2, half=True),
    ]


def _attention_hits_cases() -> list[Case]:
    def build(name, batch, heads, units, slots, threshold=5e-3, spare=0, words=0, half=False):
        def make(dtype, device):
            logits, lse, lens = scored_logits(batch, heads, slots, generator_for(name), spare)
            logits = logits.half() if half else logits
            words_ = -(-(slots + spare) // 32) + words
            hits = torch.full((batch, 3, units, words_), -1, dtype=torch.int32)[:, 1]
            return on(device, logits, lse, lens, hits, math.log(threshold))

        refused_by = HALF_LOGITS if half else ()
        return Case("attention_hits", name, make, mutates=(3,), refused_by=refused_by)

    def nothing_attended(dtype, device):
        """An empty row, and one whose pages were all holes: logits and lse are -inf."""
        logits, lse, lens = scored_logits(3, 4, 50, generator_for("nothing"))
        lens[0], lse[0], logits[0] = 0, -torch.inf, torch.nan
        lens[1], lse[1], logits[1] = 50, -torch.inf, -torch.inf
        hits = torch.full((3, 2, 2), -1, dtype=torch.int32)
        return on(device, logits, lse, lens, hits, math.log(1e-3))

    def no_slots(dtype, device):
        lse, lens = torch.full((2, 4), -torch.inf), torch.zeros(2, dtype=torch.int32)
        hits = torch.zeros(2, 2, 0, dtype=torch.int32)
        return on(device, torch.zeros(2, 4, 0), lse, lens, hits, math.log(1e-3))

    return [
        build("one-token", 1, 1, 1, 1),
        build("all-heads", 3, 8, 1, 333),
        build("groups", 2, 12, 3, 130, spare=3),
        build("per-head", 2, 5, 5, 257, words=3),
        build("word-exactly", 2, 4, 2, 64, threshold=0.4),
        build("everything-is-hit", 1, 6, 2, 95, threshold=1e-30),
        build("many-heads-long", 1, 40, 8, 4100, threshold=1e-4),
        build("half", 2, 12, 3, 132, half=True),
        build("half-odd", 2, 5, 5, 257, half=True),
        build("half-many", 2, 40, 10, 4100, threshold=1e-4, half=True),
        Case("attention_hits", "nothing-attended", nothing_attended, mutates=(3,)),
        Case("attention_hits", "no-slots", no_slots, mutates=(3,)),
    ]


def _recurrence_update_cases() -> list[Case]:
    def build(name, steps, units, lens, born, first_step, spare=0, density=3):
        def make(dtype, device):
            generator = generator_for(name)
            batch, slots = len(lens), max(max(lens), 1) + spare
            words = -(-slots // 32) + spare % 2
            shape = (steps, batch, units, words)  # a step after the other, as a caller keeps them
            hits = torch.full(shape, -1, dtype=torch.int32)
            for _ in range(density):  # a bit in 2^density; set past the end of the rows too
                hits &= torch.randint(-(2**31), 2**31, shape, generator=generator).int()
            silent = torch.randint(1, 100_000, (2, batch, units, slots), generator=generator)
            last_hit = (first_step - silent[0]).int()
            longest = (silent[1] // 2).int()
            lens_, born_ = torch.tensor([lens, born], dtype=torch.int32)
            return on(device, hits.transpose(0, 1), last_hit, longest, lens_, born_, first_step)

        return Case("recurrence_update", name, make, mutates=(1, 2))

    return [
        build("one-token", 1, 1, [1], [1], 0),
        build("one-step", 1, 2, [77, 40], [1, 0], 5),
        build("ragged", 32, 3, [131, 1, 64], [32, 1, 5], 70_000, spare=9),
        build("prompt", 7, 2, [200, 33], [200, 30], 0),
        build("empty-row", 5, 2, [0, 50], [0, 50], 12),
        build("nothing-born", 31, 1, [96, 95], [0, 0], 1_000_000),
        build("more-born-than-tokens", 4, 1, [3, 40], [9, 2], 3),
        build("silence", 32, 4, [300], [32], 65_530, density=12),
        build("every-step", 32, 2, [150], [40], 65_530, density=0),
    ]


def _select_victims_cases() -> list[Case]:
    def build(name, units, lens, kept, recent=0, room=0, spread=None, shift=0):
        def make(dtype, device):
            generator = generator_for(name)
            batch, slots = len(lens), max(max(lens), 1) + 3
            lens_, kept_ = torch.tensor([lens, kept], dtype=torch.int32)
            past = torch.arange(slots) >= lens_[:, None, None]
            # Slots in any order, as compaction leaves them; rows are slices of a slab.
            order = torch.rand(batch, units, 2, slots, generator=generator).argsort(-1)
            positions = (order * 3 + shift).int().masked_fill(past[:, :, None], 2**31 - 1)
            scores = torch.randn(batch, units, 2, slots, generator=generator)
            if spread is not None:
                scores = (scores * spread).floor()
                scores[..., ::5] = torch.nan
                scores[..., 1::7] = -torch.inf
                scores[..., 2::11] = torch.inf
            scores = scores.masked_fill(past[:, :, None], torch.nan)
            count = max(0, *(n - k for n, k in zip(lens, kept, strict=True))) + room
            return on(device, scores[:, :, 1], positions[:, :, 1], lens_, kept_, count, recent)

        return Case("select_victims", name, make)

    return [
        build("one", 1, [1], [0]),
        build("ragged", 3, [333, 70, 5], [300, 69, 5], recent=20, room=2),
        build("recent-is-all-that-stays", 2, [120, 97], [64, 64], recent=64),
        build("ties-and-nan", 2, [640, 601], [500, 100], recent=50, spread=1),
        build("all-alike", 2, [1500, 1400], [1000, 1399], recent=9, spread=0),
        build("far-positions", 1, [200, 150], [120, 120], recent=30, shift=2_147_000_000),
        build("negative-positions", 2, [200, 150], [120, 120], recent=30, shift=-(2**31)),
        build("nothing-leaves", 2, [40, 0], [40, 7], recent=90),
        build("empty-and-everything", 2, [0, 65], [3, 0], room=1),
        build("long", 2, [5003], [4000], recent=100),
        build("long-ties", 1, [9001], [4000], recent=1000, spread=2),
    ]


def _compact_kv_cases() -> list[Case]:
    def build(name, units, heads, dim, lens, counts, layout="head", where="any", state=2, room=1):
        def make(dtype, device):
            generator = generator_for(name)
            batch, slots = len(lens), max(lens) + 2
            k = kv_cache((batch, heads, slots, dim), dtype, generator, layout)
            v = kv_cache((batch, heads, slots, dim), dtype, generator, layout)
            victims = torch.full((batch, units, max(counts) + room), -1, dtype=torch.int32)
            for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
                for unit in range(units):
                    slot = torch.randperm(length, generator=generator)[:count]
                    if where == "front":
                        slot = torch.arange(count)
                    elif where == "tail":
                        slot = torch.arange(length - count, length)
                    victims[b, unit, :count] = slot.sort().values
            numbers = torch.randint(0, 99, (state, units, batch, slots + 4), generator=generator)
            followers = [n.transpose(0, 1).to(d) for n, d in zip(numbers, _STATE, strict=False)]
            lens_ = torch.tensor(lens, dtype=torch.int32)
            return on(device, k, v, followers, victims, lens_)

        def freed(args):
            for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
                for tensor in (args[0], args[1], *args[2]):
                    tensor[b, :, length - count :] = 0

        return Case("compact_kv", name, make, HALF_AND_FULL, mutates=(0, 1, 2), blank=freed)

    return [
        build("one-token-leaves", 1, 1, 32, [1], [1], state=1),
        build("ragged", 3, 3, 64, [131, 5, 77], [40, 1, 76], room=3),
        build("shared-set-token-major", 1, 4, 80, [90, 64], [30, 17], layout="token"),
        build("slab", 2, 2, 128, [70, 70], [35, 12], layout="slab", state=4),
        build("tail", 2, 2, 32, [50, 33], [20, 33], where="tail"),
        build("front", 1, 2, 32, [50, 33], [20, 5], where="front"),
        build("more-than-half-in-front", 2, 2, 32, [50], [40], where="front", state=8),
        build("nobody-leaves", 2, 2, 96, [40, 0], [0, 0], state=1),
        build("no-room-for-victims", 1, 2, 64, [9], [0], room=0, state=0),
        build("no-state-odd-rows", 3, 3, 7, [60, 41], [11, 2], layout="token", state=0),
        build("long", 2, 2, 64, [1667], [175], state=3),
    ]


_STATE = (torch.int32, torch.float32) * 4


def _rotate_keys_cases() -> list[Case]:
    def build(name, heads, slots, dim, rotated, shifts, layout="head"):
        def make(dtype, device):
            generator = generator_for(name)
            k = kv_cache((len(shifts), heads, slots, dim), dtype, generator, layout)
            inv_freq = 1e4 ** (-torch.arange(0, rotated, 2).double() / rotated)
            angle = torch.tensor(shifts)[:, None] * inv_freq
            return on(device, k, angle.cos().float(), angle.sin().float())

        return Case("rotate_keys", name, make, HALF_AND_FULL, mutates=(0,))

    return [
        build("one-token", 1, 1, 64, 64, [-3]),
        build("far", 3, 70, 128, 128, [-30_000, 0, 12_345]),
        build("part-of-a-head", 2, 33, 80, 32, [7, -1], layout="token"),
        build("odd-half", 2, 21, 96, 38, [100, 2], layout="slab"),
        build("one-pair", 1, 5, 32, 2, [1]),
        build("no-slots", 2, 0, 64, 64, [5, 6]),
        build("long", 2, 1100, 64, 64, [-4096]),
    ]


CASES: list[Case] = [
    *_attend_and_select_cases(),
    *_attention_hits_cases(),
    *_compact_kv_cases(),
    *_decode_attention_cases(),
    *_merge_states_cases(),
    *_page_scores_cases(),
    *_recurrence_update_cases(),
    *_rotate_keys_cases(),
    *_select_pages_cases(),
    *_select_victims_cases(),
    *retrieval_cases(),
]
