"""Cases of the ops that retrieve from host memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvcomp.ops.kmeans import num_clusters
from kvcomp.selftest.case import (
    HALF_AND_FULL,
    Case,
    attention_inputs,
    generator_for,
    ints,
    kv_cache,
    on,
)


def _kmeans_cases() -> list[Case]:
    """Labels must equal the exact ones, so no token may lie between two centres. Random keys are
    fp32 only, with seeds that leave a margin; keys of all dtypes have planted clusters."""

    def build(name, heads, tokens, dim, ranges, size, window, iterations=3, layout="head", seed=0):
        def make(dtype, device):
            generator = generator_for(name, seed)
            keys = kv_cache((len(ranges), heads, tokens, dim), dtype, generator, layout)
            keys += 2 * torch.randn(heads, 1, dim, generator=generator)
            bounds = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
            return on(device, keys, *bounds, size, window, iterations)

        return Case("kmeans", name, make)

    def planted(name, heads, dim, ranges, size, window, iterations=2, layout="head"):
        def make(dtype, device):
            generator = generator_for(name)
            shape = len(ranges), heads, max(last for _, last in ranges) + 3, dim
            keys = kv_cache(shape, torch.float32, generator, layout).to(dtype)  # keeps the strides
            for row, (begin, end) in enumerate(ranges):
                for start in range(begin, end, window):
                    count = min(window, end - start)
                    clusters = num_clusters(count, size, window)
                    label = torch.randint(clusters, (heads, count), generator=generator)
                    label[:, torch.arange(clusters) * count // clusters] = torch.arange(clusters)
                    ray = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q * 8
                    near = torch.randn(heads, count, dim, generator=generator) * 0.2
                    keys[row, :, start : start + count] = (ray[label] + near + 1).to(dtype)
            bounds = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
            return on(device, keys, *bounds, size, window, iterations)

        return Case("kmeans", name, make, HALF_AND_FULL)

    def all_alike(dtype, device):
        """Centred they are 0, near to every centre alike: all join the first."""
        keys = torch.full((1, 2, 64, 32), 0.5).to(dtype)
        return on(device, keys, ints([0]), ints([64]), 16, 8192, 2)

    return [
        build("one-token", 1, 1, 32, [(0, 1)], 16, 8192),
        build("fewer-than-a-cluster", 2, 5, 64, [(0, 5), (2, 4)], 16, 8192),
        build("ragged-windows", 2, 150, 64, [(0, 150), (7, 8), (3, 131), (9, 9)], 16, 64),
        build("a-cluster-each", 1, 40, 80, [(1, 38)], 1, 8192, layout="slab"),
        build("token-major", 3, 70, 128, [(0, 70)], 8, 33, layout="token"),
        build("one-assignment", 1, 90, 256, [(0, 90)], 7, 50, iterations=1),
        build("latents", 1, 60, 576, [(3, 60)], 8, 50),
        planted("planted", 2, 64, [(0, 100)], 10, 8192),
        planted("planted-windows", 2, 80, [(3, 130), (0, 97)], 12, 50, 3, layout="token"),
        planted("planted-few", 1, 96, [(0, 40), (5, 6)], 16, 24, layout="slab"),
        Case("kmeans", "all-alike", all_alike, HALF_AND_FULL),
    ]


def _query_similarity_cases() -> list[Case]:
    def build(name, batch, heads, dim, turn, layout="head"):
        def make(dtype, device):
            generator = generator_for(name)
            previous = torch.randn(batch, heads, dim, generator=generator)
            other = torch.randn(batch, heads, dim, generator=generator)
            q = previous + turn * other
            q, previous = q.to(dtype), previous.to(dtype)
            if layout == "slab":
                q = torch.cat([q, q], 1)[:, :heads]
            return on(device, q, previous)

        return Case("query_similarity", name, make, HALF_AND_FULL, mutates=(1,))

    def zeros(dtype, device):
        """A row without a step before, one with heads that are 0, one of nothing at all."""
        q, previous = torch.randn(2, 4, 5, 48, generator=generator_for("zeros")).to(dtype)
        previous[0], previous[1, 2], q[1, 3], q[2], previous[3], q[3] = 0, 0, 0, 0, 0, 0
        return on(device, q, previous)

    def opposite(dtype, device):
        q = torch.randn(2, 3, 64, generator=generator_for("opposite")).to(dtype)
        return on(device, q, -q)

    return [
        build("one-head", 1, 1, 32, 0.5),
        build("alike", 2, 7, 80, 1e-3),
        build("odd", 3, 5, 96, 1.0, layout="slab"),
        build("wide", 2, 2, 512, 0.3),
        build("latents", 1, 16, 576, 0.3),
        build("many", 5, 32, 128, 0.3),
        Case("query_similarity", "zeros", zeros, HALF_AND_FULL, mutates=(1,)),
        Case("query_similarity", "opposite", opposite, HALF_AND_FULL, mutates=(1,)),
    ]


def _segment_boundaries_cases() -> list[Case]:
    def build(name, rows, heads=2, shortest=4, longest=16, local=20):
        """Rows of (similarity, tokens in each unit, units indexed, tokens of the open segment)."""

        def make(dtype, device):
            spare = max(len(sizes) for _, sizes, _, _ in rows) + 3
            starts = torch.full((len(rows), heads + 1, spare), -5, dtype=torch.int32)[:, :heads]
            lengths = []
            for row, (_, sizes, _, open_) in enumerate(rows):
                bounds = ints([0, *sizes]).cumsum(0)
                starts[row, :, : len(bounds)] = bounds
                starts[row, 1:, 1 : len(bounds) - 1] += 1  # clusters of the prompt: own to a head
                lengths.append(int(bounds[-1]) + open_ + 1)
            columns = zip(*rows, strict=True)
            similarity, sizes, indexed, _ = columns
            return on(
                device,
                torch.tensor(similarity, dtype=torch.float32),
                ints(lengths),
                starts,
                ints([len(each) for each in sizes]),
                ints(indexed),
                *(0.75, 0.5, shortest, longest, local),
            )

        return Case("segment_boundaries", name, make, mutates=(2, 3, 4))

    low, high, nan = 0.1, 0.9, math.nan
    return [
        build("first-token", [(-math.inf, [], 0, 0)]),
        build("nothing-open", [(low, [9, 8], 1, 0), (high, [9, 8], 2, 0), (low, [9], 0, -1)]),
        build("short", [(low, [30, 7], 1, 3), (0.6, [30, 7], 2, 4), (high, [30, 7], 2, 15)]),
        build("long", [(high, [30], 1, 16), (nan, [30], 1, 16), (nan, [30], 1, 90)]),
        build("on-the-threshold", [(0.75, [5, 5], 1, 8), (0.5, [5, 5], 1, 8)], heads=1),
        build("many-leave", [(low, [6] * 20, 3, 5), (high, [6] * 20, 3, 5), (nan, [1] * 99, 0, 1)]),
        build("local-is-full", [(high, [40, 12, 9], 1, 15), (high, [40, 12, 8], 1, 15)]),
        build("keeps-none", [(low, [5, 0, 3], 0, 2)], shortest=1, longest=1, local=0),
        build("many-rows", [(low + i / 50, [3, i, 9], i % 3, i % 19) for i in range(40)], heads=5),
    ]


def _pool(blocks, k, v, dtype, device, generator) -> list[Tensor]:
    """Blocks of host rows [B, H, R, 2, D], or [B, H, R, D + Dv] where these differ; pinned where a
    GPU will reach for them."""
    row = (2, k.shape[3]) if k.shape == v.shape else (k.shape[3] + v.shape[3],)
    shapes = [(*k.shape[:2], rows, *row) for rows in blocks]
    pool = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [block.pin_memory() for block in pool] if device == "cuda" else pool


def _store_segments_cases() -> list[Case]:
    def build(name, heads, dim, lens, closed, blocks, layout="head", units=3, value_dim=None):
        def make(dtype, device):
            generator = generator_for(name)
            batch, slots, num_rows = len(lens), max(lens) + 4, sum(blocks)
            k = kv_cache((batch, heads, slots, dim), dtype, generator, layout)
            v = kv_cache((batch, heads, slots, dim), dtype, generator, layout)[..., :value_dim]
            # What lies past the end looks like the segment.
            slot_rows = torch.full((batch, heads + 1, slots + 2), num_rows - 1, dtype=torch.int32)
            slot_rows = slot_rows[:, :heads]
            starts = torch.full((batch, heads, units + 1), -1, dtype=torch.int32)
            num_units = torch.arange(batch, dtype=torch.int32) % units + 1
            for row, (length, count) in enumerate(zip(lens, closed, strict=True)):
                k[row, :, length:] = torch.nan
                begin = num_rows - count - row % 2
                unit = num_units[row] - 1
                starts[row, :, unit : unit + 2] = ints([begin, begin + count])
                for head in range(heads):
                    old = torch.randperm(begin, generator=generator)[: length - count]
                    held = torch.cat([old, torch.arange(begin, begin + count)])
                    order = torch.randperm(len(held), generator=generator)
                    slot_rows[row, head, :length] = held[order]
            pool = _pool(blocks, k, v, dtype, device, generator)
            centroids = torch.zeros(batch, heads, units + 2, dim, dtype=dtype)[:, :, :units]
            lens_, closed_ = ints(lens), ints(closed)
            args = on(device, k, v, slot_rows, lens_, starts, num_units, closed_)
            return *args, pool, centroids.to(device)

        return Case("store_segments", name, make, HALF_AND_FULL, mutates=(7, 8))

    return [
        build("one-token", 1, 32, [1], [1], [1]),
        build("ragged", 3, 64, [90, 41, 70], [17, 1, 30], [200]),
        build("nothing-closed", 2, 32, [20, 0], [0, 0], [40]),
        build("some-closed", 2, 80, [20, 33, 0], [0, 9, 0], [40], layout="token"),
        build("across-blocks", 2, 128, [60, 55], [40, 31], [70, 9, 0, 5, 30], layout="slab"),
        build("many-tokens", 2, 96, [300], [150], [400]),
        build("crooked", 2, 64, [50, 33], [20, 9], [70], layout="crooked"),
        build("unlike", 2, 192, [60, 55], [40, 31], [70, 9, 40], value_dim=128),
        build("no-v", 1, 80, [60, 55], [40, 31], [70, 9, 40], layout="slab", value_dim=0),
        build("everything", 1, 256, [66], [66], [3, 63]),
    ]


def _unit_starts(batch, heads, units, most, generator) -> Tensor:
    """[B, H, U + 1] of units of 0 to `most` tokens."""
    sizes = torch.randint(0, most + 1, (batch, heads, units + 1), generator=generator)
    return sizes.cumsum(-1).int()


def _unit_scores_cases() -> list[Case]:
    def build(name, heads, kv_heads, units, dim, indexed, active=None, most=3, layout="head"):
        def make(dtype, device):
            batch = len(indexed)
            q, k, _ = attention_inputs(batch, heads, kv_heads, units, dim, dtype, layout)
            starts = _unit_starts(batch, kv_heads, units, most, generator_for(name))
            num_indexed = ints(indexed)
            absent = torch.arange(units) >= num_indexed[:, None, None]
            k[absent | (starts[..., 1:] == starts[..., :-1])] = torch.nan  # never written
            active_ = ints(active or [1] * batch)
            return on(device, q, k, starts, num_indexed, active_, dim**-0.5)

        return Case("unit_scores", name, make, HALF_AND_FULL)

    return [
        build("one-unit", 1, 1, 1, 32, [1]),
        build("ragged", 8, 2, 133, 64, [133, 1, 70]),
        build("no-group", 3, 3, 65, 80, [64, 65], layout="slab"),
        build("group7", 14, 2, 90, 128, [90, 33]),
        build("inactive", 4, 2, 50, 96, [50, 50, 20], active=[0, 1, 0]),
        build("nothing-indexed", 4, 2, 40, 32, [0, 39], layout="slab"),
        build("all-empty", 2, 1, 20, 16, [20], most=0),
        build("mostly-empty", 4, 4, 200, 64, [200, 190], most=1),
        build("wide", 6, 2, 70, 512, [70]),
        build("pages-of-latents", 16, 1, 40, 1152, [40]),
        build("long", 10, 2, 1500, 64, [1500]),
    ]


def _select_units_cases() -> list[Case]:
    def build(name, heads, units, budget, indexed, active=None, most=20, spread=None, fall=0.0):
        def make(dtype, device):
            generator = generator_for(name)
            batch = len(indexed)
            starts = _unit_starts(batch, heads, units, most, generator)
            scores = torch.randn(batch, 2, heads, units, generator=generator)[:, 1]
            scores *= 10 ** (-fall * torch.rand(scores.shape, generator=generator))
            if spread is not None:
                scores = (scores * spread).floor()  # with zeros of both signs
                scores[..., ::3] *= -1
                scores[..., ::5] = torch.nan
                scores[..., 1::7] = -torch.inf
                scores[..., 2::11] = torch.inf
            num_indexed = ints(indexed)
            past = torch.arange(units + 1) > num_indexed[:, None, None]
            starts = starts.masked_fill(past, 3)
            scores = scores.masked_fill(past[..., 1:], torch.inf)
            return on(device, scores, starts, num_indexed, ints(active or [1] * batch), budget)

        return Case("select_units", name, make)

    return [
        build("one-unit", 1, 1, 4, [1]),
        build("ragged", 3, 150, 300, [150, 1, 77]),
        build("one-token", 2, 40, 1, [40, 9]),
        build("fits", 2, 20, 500, [20, 13]),
        build("fits-exactly", 1, 33, 33, [33], most=0),
        build("inactive", 2, 30, 64, [30, 30, 30], active=[1, 0, 5]),
        build("nothing-indexed", 2, 30, 64, [0, 30]),
        build("ties-and-nan", 4, 333, 900, [333, 300, 200], spread=1),
        build("all-alike", 2, 129, 100, [129, 128], spread=0),
        build("large-units", 2, 9, 700, [9, 8], most=600),
        build("many-empty", 2, 200, 40, [200, 150], most=1),
        build("long", 2, 2048, 1024, [2048, 2001], most=32, fall=9.0),
    ]


def _fetch_rows_cases() -> list[Case]:
    def build(
        name,
        heads,
        dim,
        rows,
        blocks,
        sinks=4,
        share=0.7,
        active=None,
        layout="head",
        spare=3,
        value_dim=None,
    ):
        """Rows of (retrieved tokens in the slots, wanted ones, local ones, first local row)."""

        def make(dtype, device):
            generator = generator_for(name)
            batch = len(rows)
            lens = [sinks + held + local for held, _, local, _ in rows]
            after = [sinks + wanted + local for _, wanted, local, _ in rows]
            slots = max(lens + after)
            k = kv_cache((batch, heads, slots + 1, dim), dtype, generator, layout)
            v = kv_cache((batch, heads, slots + 1, dim), dtype, generator, layout)[..., :value_dim]
            slot_rows = torch.full((batch, heads, slots), sinks + 1, dtype=torch.int32)
            listed = max(wanted for _, wanted, _, _ in rows) + spare
            wanted_ = torch.full((batch, heads, listed), -1, dtype=torch.int32)
            for row, (held, wanted, local, first_local) in enumerate(rows):
                for head in range(heads):
                    own = torch.randperm(first_local - sinks, generator=generator) + sinks
                    same = min(round(share * min(held, wanted)), held, wanted)
                    same = max(same, held + wanted - len(own))
                    resident, other = own[:held], own[held : held + wanted - same]
                    want = torch.cat([resident[:same], other])
                    wanted_[row, head, :wanted] = want.sort().values
                    near = torch.arange(first_local, first_local + local)
                    all_ = torch.cat([torch.arange(sinks), resident, near])
                    order = torch.randperm(len(all_), generator=generator)
                    slot_rows[row, head, : lens[row]] = all_[order]
            active_ = active or [1] * batch
            for row in range(batch):
                if not active_[row]:
                    wanted_[row] = 99
            args = k, v, slot_rows, ints(lens), wanted_
            first_local = ints([first for *_, first in rows])
            pool = _pool(blocks, k, v, dtype, device, generator)
            return *on(device, *args, first_local, ints(active_)), pool, sinks

        def past_the_end(args):
            for row, length in enumerate(args[3].tolist()):
                for tensor in args[:2]:
                    tensor[row, :, length:] = 0

        written = (0, 1, 2, 3)
        return Case("fetch_rows", name, make, HALF_AND_FULL, mutates=written, blank=past_the_end)

    return [
        build("first-row", 1, 32, [(0, 1, 0, 1)], [1], sinks=0),
        build("delta", 3, 64, [(60, 60, 20, 300), (31, 31, 7, 150)], [300], spare=0),
        build("grows", 2, 80, [(10, 64, 12, 200), (0, 50, 30, 90)], [256], layout="token"),
        build("grows-past-the-end", 2, 32, [(40, 70, 5, 500)], [500], share=1.0),
        build("shrinks", 2, 128, [(70, 33, 9, 140), (50, 1, 16, 99)], [150], layout="slab"),
        build("gives-all-up", 2, 32, [(40, 0, 6, 80), (0, 0, 6, 80)], [80]),
        build("all-resident", 2, 96, [(45, 45, 3, 70), (45, 20, 3, 70)], [70], share=1.0),
        build("nothing-shared", 2, 64, [(30, 30, 8, 64)], [40, 24], share=0.0),
        build("inactive", 2, 32, [(20, 25, 8, 90)] * 3, [90], active=[0, 1, 0]),
        build("blocks", 3, 64, [(80, 100, 10, 400)], [100, 1, 0, 37, 200, 62], share=0.3),
        build("empty", 2, 32, [(0, 0, 0, 0), (0, 5, 0, 20)], [20], sinks=0),
        build("unlike", 2, 192, [(20, 24, 2, 50), (9, 4, 3, 30)], [40, 10], value_dim=128),
        build("no-v", 1, 48, [(20, 24, 2, 50), (9, 4, 3, 30)], [40, 10], value_dim=0),
        build("wide", 1, 512, [(20, 24, 2, 50)], [50]),
        build("crooked", 2, 64, [(20, 24, 2, 50), (9, 4, 3, 30)], [40, 10], layout="crooked"),
        build("long", 2, 64, [(1024, 1024, 250, 9000)], [8192, 1000]),
    ]


def retrieval_cases() -> list[Case]:
    return [
        *_kmeans_cases(),
        *_query_similarity_cases(),
        *_segment_boundaries_cases(),
        *_store_segments_cases(),
        *_unit_scores_cases(),
        *_select_units_cases(),
        *_fetch_rows_cases(),
    ]
