"""Cases per op: the inputs that tests run on every implementation, small, odd and nasty.

A case makes the positional arguments of the op's schema. Floating inputs have the spread of real
attention (a few tokens hold most of the mass), lengths are ragged and odd, K and V come in the
layouts that caches have, and every table of cases holds length 1 and rows with nothing valid.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.ops.kmeans import num_clusters


@dataclass(frozen=True)
class Case:
    """One input of an op. `make(dtype, device)` returns the schema's positional arguments."""

    op: str
    name: str
    make: Callable[[torch.dtype, str], tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    mutates: tuple[int, ...] = ()  # positions of the arguments that the op writes
    blank: Callable[[tuple], None] | None = None  # overwrites what the op leaves unspecified there

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


HALF_AND_FULL = (torch.float32, torch.float16, torch.bfloat16)


def _generator(*key) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def kv_cache(shape, dtype, generator, layout="head") -> Tensor:
    """[B, Hkv, T, D]: head-major, token-major ([B, T, Hkv, D] in memory) or a slice of a slab."""
    batch, heads, slots, dim = shape
    if layout == "token":
        return torch.randn(batch, slots, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    if layout == "slab":
        spare = torch.randn(batch, heads, slots + 5, dim, generator=generator).to(dtype)
        return spare[:, :, :slots]
    return torch.randn(*shape, generator=generator).to(dtype)


def attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout="head", peak=2.0):
    """q, k, v with logits of standard deviation `peak`, so that some tokens stand out."""
    generator = _generator(batch, heads, kv_heads, slots, dim)
    q = (torch.randn(batch, dim, heads, generator=generator) * peak).to(dtype).transpose(1, 2)
    q = q.contiguous() if layout != "slab" else torch.cat([q, q], 1)[:, :heads]
    k = kv_cache((batch, kv_heads, slots, dim), dtype, generator, layout)
    v = kv_cache((batch, kv_heads, slots, dim), dtype, generator, layout)
    return q, k, v


def _dense(name, batch, heads, kv_heads, slots, dim, lens, layout="head", logits=False):
    def make(dtype, device):
        q, k, v = attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout)
        buffer = torch.full((batch, heads, slots + 3), torch.nan) if logits else None
        lens_ = torch.tensor(lens, dtype=torch.int32)
        return _to(device, q, k, v, lens_, None, 1, dim**-0.5, buffer)

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
    logits=False,
):
    def make(dtype, device):
        q, k, v = attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout)
        generator = _generator(name)
        pages = slots // page_size
        sets = torch.rand(batch, 1 if shared else kv_heads, pages, generator=generator)
        page_ids = sets.argsort(-1)[..., :count].sort(-1).values.int()
        lens = torch.randint(1, count * page_size + 1, (batch,), generator=generator).int()
        lens[-1] = count * page_size
        if holes:
            page_ids[:, :, ::3] = -1
            page_ids[0] = -1  # a row of holes attends to nothing
        buffer = torch.full((batch, heads, count * page_size), torch.nan) if logits else None
        return _to(device, q, k, v, lens, page_ids, page_size, dim**-0.5, buffer)

    return _attention_case(name, make, logits)


def _attention_case(name, make, logits) -> Case:
    def unattended(args):
        args[7][~args[7].isfinite()] = 0  # left alone or -inf

    if not logits:
        return Case("decode_attention", name, make, HALF_AND_FULL)
    return Case("decode_attention", name, make, HALF_AND_FULL, mutates=(7,), blank=unattended)


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
        _dense("logits", 2, 6, 2, 150, 64, [150, 9], logits=True),
    ]
    paged = [
        _paged("tokens-per-head", 2, 8, 2, 200, 64, 1, 37, shared=False),
        _paged("tokens-shared", 2, 4, 2, 90, 32, 1, 20, shared=True, layout="token"),
        _paged("pages16-shared", 2, 8, 4, 330, 128, 16, 6, shared=True),
        _paged("pages16-per-head", 2, 6, 3, 200, 64, 16, 5, shared=False, layout="slab"),
        _paged("pages32-holes", 3, 4, 2, 260, 64, 32, 5, shared=False, holes=True),
        _paged("pages64-logits", 2, 4, 1, 400, 80, 64, 3, shared=True, logits=True),
    ]
    return dense + paged


def _merge_states_cases() -> list[Case]:
    def build(name, batch, heads, dim, empty):
        def make(dtype, device):
            generator = _generator(name)
            outs = [torch.randn(batch, heads, dim, generator=generator).to(dtype) for _ in "ab"]
            lses = [torch.randn(batch, heads, generator=generator) * 4 for _ in "ab"]
            if empty:
                lses[0][0] = lses[1][0] = -torch.inf  # both sides empty: neutral again
                lses[1][1:, 0] = -torch.inf
                outs[0][0] = outs[1][0] = 0
            return _to(device, outs[0], lses[0], outs[1], lses[1])

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
    def build(name, batch, heads, slots, page_size, groups=1, use_max=True, spare=0):
        def make(dtype, device):
            logits, lse, lens = scored_logits(batch, heads, slots, _generator(name), spare)
            return _to(device, logits, lse, lens, page_size, groups, use_max)

        return Case("page_scores", name, make)

    def empty_row(dtype, device):
        logits, lse, lens = scored_logits(2, 4, 50, _generator("empty"))
        lens[0], lse[0], logits[0] = 0, -torch.inf, torch.nan
        return _to(device, logits, lse, lens, 16, 1, True)

    def all_masked(dtype, device):
        """A row whose pages were all holes: its logits and lse are -inf, its scores 0."""
        logits, lse, lens = scored_logits(2, 4, 50, _generator("masked"))
        logits[0], lse[0] = -torch.inf, -torch.inf
        return _to(device, logits, lse, lens, 16, 2, True)

    return [
        build("one-token", 1, 1, 1, 16),
        build("max", 3, 8, 333, 16),
        build("max-groups", 2, 12, 130, 16, groups=3),
        build("sum", 2, 8, 129, 32, use_max=False),
        build("sum-groups-tokens", 2, 8, 60, 1, groups=4, use_max=False),
        build("strided", 2, 7, 257, 64, spare=31),
        build("many-heads-long", 1, 40, 4100, 16),
        Case("page_scores", "empty-row", empty_row),
        Case("page_scores", "all-masked", all_masked),
    ]


def _select_pages_cases() -> list[Case]:
    def build(name, batch, heads, lens, page_size, count, recent=1, sink=0, ties=False):
        def make(dtype, device):
            generator = _generator(name)
            lens_ = torch.tensor(lens, dtype=torch.int32)
            pages = -(-max(max(lens), 1) // page_size)
            scores = torch.rand(batch, heads, pages, generator=generator)
            if ties:
                scores = (scores * 3).floor()
                scores[..., ::5] = torch.nan
            return _to(device, scores, lens_, page_size, count, recent, sink)

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
    ]


def _attention_hits_cases() -> list[Case]:
    def build(name, batch, heads, units, slots, threshold=5e-3, spare=0, words=0):
        def make(dtype, device):
            logits, lse, lens = scored_logits(batch, heads, slots, _generator(name), spare)
            words_ = -(-(slots + spare) // 32) + words
            hits = torch.full((batch, 3, units, words_), -1, dtype=torch.int32)[:, 1]
            return _to(device, logits, lse, lens, hits, math.log(threshold))

        return Case("attention_hits", name, make, mutates=(3,))

    def nothing_attended(dtype, device):
        """An empty row, and one whose pages were all holes: logits and lse are -inf."""
        logits, lse, lens = scored_logits(3, 4, 50, _generator("nothing"))
        lens[0], lse[0], logits[0] = 0, -torch.inf, torch.nan
        lens[1], lse[1], logits[1] = 50, -torch.inf, -torch.inf
        hits = torch.full((3, 2, 2), -1, dtype=torch.int32)
        return _to(device, logits, lse, lens, hits, math.log(1e-3))

    def no_slots(dtype, device):
        lse, lens = torch.full((2, 4), -torch.inf), torch.zeros(2, dtype=torch.int32)
        hits = torch.zeros(2, 2, 0, dtype=torch.int32)
        return _to(device, torch.zeros(2, 4, 0), lse, lens, hits, math.log(1e-3))

    return [
        build("one-token", 1, 1, 1, 1),
        build("all-heads", 3, 8, 1, 333),
        build("groups", 2, 12, 3, 130, spare=3),
        build("per-head", 2, 5, 5, 257, words=3),
        build("word-exactly", 2, 4, 2, 64, threshold=0.4),
        build("everything-is-hit", 1, 6, 2, 95, threshold=1e-30),
        build("many-heads-long", 1, 40, 8, 4100, threshold=1e-4),
        Case("attention_hits", "nothing-attended", nothing_attended, mutates=(3,)),
        Case("attention_hits", "no-slots", no_slots, mutates=(3,)),
    ]


def _recurrence_update_cases() -> list[Case]:
    def build(name, steps, units, lens, born, first_step, spare=0, density=3):
        def make(dtype, device):
            generator = _generator(name)
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
            return _to(device, hits.transpose(0, 1), last_hit, longest, lens_, born_, first_step)

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
            generator = _generator(name)
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
            return _to(device, scores[:, :, 1], positions[:, :, 1], lens_, kept_, count, recent)

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
            generator = _generator(name)
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
            return _to(device, k, v, followers, victims, lens_)

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
            generator = _generator(name)
            k = kv_cache((len(shifts), heads, slots, dim), dtype, generator, layout)
            inv_freq = 1e4 ** (-torch.arange(0, rotated, 2).double() / rotated)
            angle = torch.tensor(shifts)[:, None] * inv_freq
            return _to(device, k, angle.cos().float(), angle.sin().float())

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


def _kmeans_cases() -> list[Case]:
    """Labels must be those of the truth, so no token may lie between two centres: random keys are
    fp32 only, of seeds that leave a margin; those of all dtypes have clusters planted in them."""

    def build(name, heads, tokens, dim, ranges, size, window, iterations=3, layout="head", seed=0):
        def make(dtype, device):
            generator = _generator(name, seed)
            keys = kv_cache((len(ranges), heads, tokens, dim), dtype, generator, layout)
            keys += 2 * torch.randn(heads, 1, dim, generator=generator)
            bounds = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
            return _to(device, keys, *bounds, size, window, iterations)

        return Case("kmeans", name, make)

    def planted(name, heads, dim, ranges, size, window, iterations=2, layout="head"):
        def make(dtype, device):
            generator = _generator(name)
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
            return _to(device, keys, *bounds, size, window, iterations)

        return Case("kmeans", name, make, HALF_AND_FULL)

    def all_alike(dtype, device):
        """Centred they are 0, near to every centre alike: all join the first."""
        keys = torch.full((1, 2, 64, 32), 0.5).to(dtype)
        return _to(device, keys, _ints([0]), _ints([64]), 16, 8192, 2)

    return [
        build("one-token", 1, 1, 32, [(0, 1)], 16, 8192),
        build("fewer-than-a-cluster", 2, 5, 64, [(0, 5), (2, 4)], 16, 8192),
        build("ragged-windows", 2, 150, 64, [(0, 150), (7, 8), (3, 131), (9, 9)], 16, 64),
        build("a-cluster-each", 1, 40, 80, [(1, 38)], 1, 8192, layout="slab"),
        build("token-major", 3, 70, 128, [(0, 70)], 8, 33, layout="token"),
        build("one-assignment", 1, 90, 256, [(0, 90)], 7, 50, iterations=1),
        planted("planted", 2, 64, [(0, 100)], 10, 8192),
        planted("planted-windows", 2, 80, [(3, 130), (0, 97)], 12, 50, 3, layout="token"),
        planted("planted-few", 1, 96, [(0, 40), (5, 6)], 16, 24, layout="slab"),
        Case("kmeans", "all-alike", all_alike, HALF_AND_FULL),
    ]


def _query_similarity_cases() -> list[Case]:
    def build(name, batch, heads, dim, turn, layout="head"):
        def make(dtype, device):
            generator = _generator(name)
            previous = torch.randn(batch, heads, dim, generator=generator)
            other = torch.randn(batch, heads, dim, generator=generator)
            q = previous + turn * other
            q, previous = q.to(dtype), previous.to(dtype)
            if layout == "slab":
                q = torch.cat([q, q], 1)[:, :heads]
            return _to(device, q, previous)

        return Case("query_similarity", name, make, HALF_AND_FULL, mutates=(1,))

    def zeros(dtype, device):
        """A row without a step before, one with heads that are 0, one of nothing at all."""
        q, previous = torch.randn(2, 4, 5, 48, generator=_generator("zeros")).to(dtype)
        previous[0], previous[1, 2], q[1, 3], q[2], previous[3], q[3] = 0, 0, 0, 0, 0, 0
        return _to(device, q, previous)

    def opposite(dtype, device):
        q = torch.randn(2, 3, 64, generator=_generator("opposite")).to(dtype)
        return _to(device, q, -q)

    return [
        build("one-head", 1, 1, 32, 0.5),
        build("alike", 2, 7, 80, 1e-3),
        build("odd", 3, 5, 96, 1.0, layout="slab"),
        build("wide", 2, 2, 512, 0.3),
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
                bounds = _ints([0, *sizes]).cumsum(0)
                starts[row, :, : len(bounds)] = bounds
                starts[row, 1:, 1 : len(bounds) - 1] += 1  # clusters of the prompt: own to a head
                lengths.append(int(bounds[-1]) + open_ + 1)
            columns = zip(*rows, strict=True)
            similarity, sizes, indexed, _ = columns
            return _to(
                device,
                torch.tensor(similarity, dtype=torch.float32),
                _ints(lengths),
                starts,
                _ints([len(each) for each in sizes]),
                _ints(indexed),
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


def _pool(blocks, batch, heads, dim, dtype, device, generator) -> list[Tensor]:
    """Blocks of host rows [B, H, R, 2, D]; pinned where a GPU will reach for them."""
    shapes = [(batch, heads, rows, 2, dim) for rows in blocks]
    pool = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [block.pin_memory() for block in pool] if device == "cuda" else pool


def _store_segments_cases() -> list[Case]:
    def build(name, heads, dim, lens, closed, blocks, layout="head", units=3):
        def make(dtype, device):
            generator = _generator(name)
            batch, slots, num_rows = len(lens), max(lens) + 4, sum(blocks)
            k = kv_cache((batch, heads, slots, dim), dtype, generator, layout)
            v = kv_cache((batch, heads, slots, dim), dtype, generator, layout)
            # What lies past the end looks like the segment.
            slot_rows = torch.full((batch, heads + 1, slots + 2), num_rows - 1, dtype=torch.int32)
            slot_rows = slot_rows[:, :heads]
            starts = torch.full((batch, heads, units + 1), -1, dtype=torch.int32)
            num_units = torch.arange(batch, dtype=torch.int32) % units + 1
            for row, (length, count) in enumerate(zip(lens, closed, strict=True)):
                k[row, :, length:] = torch.nan
                begin = num_rows - count - row % 2
                unit = num_units[row] - 1
                starts[row, :, unit : unit + 2] = _ints([begin, begin + count])
                for head in range(heads):
                    old = torch.randperm(begin, generator=generator)[: length - count]
                    held = torch.cat([old, torch.arange(begin, begin + count)])
                    order = torch.randperm(len(held), generator=generator)
                    slot_rows[row, head, :length] = held[order]
            pool = _pool(blocks, batch, heads, dim, dtype, device, generator)
            centroids = torch.zeros(batch, heads, units + 2, dim, dtype=dtype)[:, :, :units]
            lens_, closed_ = _ints(lens), _ints(closed)
            args = _to(device, k, v, slot_rows, lens_, starts, num_units, closed_)
            return *args, pool, centroids.to(device)

        return Case("store_segments", name, make, HALF_AND_FULL, mutates=(7, 8))

    return [
        build("one-token", 1, 32, [1], [1], [1]),
        build("ragged", 3, 64, [90, 41, 70], [17, 1, 30], [200]),
        build("nothing-closed", 2, 32, [20, 0], [0, 0], [40]),
        build("some-closed", 2, 80, [20, 33, 0], [0, 9, 0], [40], layout="token"),
        build("across-blocks", 2, 128, [60, 55], [40, 31], [70, 9, 0, 5, 30], layout="slab"),
        build("many-tokens", 2, 96, [300], [150], [400]),
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
            starts = _unit_starts(batch, kv_heads, units, most, _generator(name))
            num_indexed = _ints(indexed)
            absent = torch.arange(units) >= num_indexed[:, None, None]
            k[absent | (starts[..., 1:] == starts[..., :-1])] = torch.nan  # never written
            active_ = _ints(active or [1] * batch)
            return _to(device, q, k, starts, num_indexed, active_, dim**-0.5)

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
        build("long", 10, 2, 1500, 64, [1500]),
    ]


def _select_units_cases() -> list[Case]:
    def build(name, heads, units, budget, indexed, active=None, most=20, spread=None, fall=0.0):
        def make(dtype, device):
            generator = _generator(name)
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
            num_indexed = _ints(indexed)
            past = torch.arange(units + 1) > num_indexed[:, None, None]
            starts = starts.masked_fill(past, 3)
            scores = scores.masked_fill(past[..., 1:], torch.inf)
            return _to(device, scores, starts, num_indexed, _ints(active or [1] * batch), budget)

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
    ):
        """Rows of (retrieved tokens in the slots, wanted ones, local ones, first local row)."""

        def make(dtype, device):
            generator = _generator(name)
            batch = len(rows)
            lens = [sinks + held + local for held, _, local, _ in rows]
            after = [sinks + wanted + local for _, wanted, local, _ in rows]
            slots = max(lens + after)
            k = kv_cache((batch, heads, slots + 1, dim), dtype, generator, layout)
            v = kv_cache((batch, heads, slots + 1, dim), dtype, generator, layout)
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
            args = k, v, slot_rows, _ints(lens), wanted_
            first_local = _ints([first for *_, first in rows])
            pool = _pool(blocks, batch, heads, dim, dtype, device, generator)
            return *_to(device, *args, first_local, _ints(active_)), pool, sinks

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
        build("wide", 1, 512, [(20, 24, 2, 50)], [50]),
        build("long", 2, 64, [(1024, 1024, 250, 9000)], [8192, 1000]),
    ]


def _ints(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _to(device: str, *args) -> tuple:
    def move(a):
        if isinstance(a, list):
            return [move(item) for item in a]
        return a.to(device) if isinstance(a, Tensor) else a

    return tuple(move(a) for a in args)


CASES: list[Case] = [
    *_attention_hits_cases(),
    *_compact_kv_cases(),
    *_decode_attention_cases(),
    *_fetch_rows_cases(),
    *_kmeans_cases(),
    *_merge_states_cases(),
    *_page_scores_cases(),
    *_query_similarity_cases(),
    *_recurrence_update_cases(),
    *_rotate_keys_cases(),
    *_segment_boundaries_cases(),
    *_select_pages_cases(),
    *_select_units_cases(),
    *_select_victims_cases(),
    *_store_segments_cases(),
    *_unit_scores_cases(),
]
