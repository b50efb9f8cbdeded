"""Cases of the ops that evict, and of the one that moves keys."""

from __future__ import annotations

import math

import torch

from kvcomp.selftest.case import (
    HALF_AND_FULL,
    HALF_LOGITS,
    Case,
    generator_for,
    kv_cache,
    on,
    scored_logits,
)


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
    def build(
        name,
        units,
        heads,
        dim,
        lens,
        counts,
        layout="head",
        where="any",
        state=2,
        room=1,
        values=None,
    ):
        def make(dtype, device):
            generator = generator_for(name)
            batch, slots = len(lens), max(lens) + 2
            k = kv_cache((batch, heads, slots, dim), dtype, generator, layout)
            v = kv_cache((batch, heads, slots, dim), dtype, generator, layout)[..., :values]
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
        build("unlike", 2, 2, 192, [70, 41], [35, 12], values=128),
        build("no-v", 1, 1, 48, [70, 41], [35, 12], values=0),
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


def eviction_cases() -> list[Case]:
    return [
        *_attention_hits_cases(),
        *_compact_kv_cases(),
        *_recurrence_update_cases(),
        *_rotate_keys_cases(),
        *_select_victims_cases(),
    ]
