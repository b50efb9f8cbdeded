"""Cases per op: the inputs that tests run on every implementation, small, odd and nasty.

A case makes the positional arguments of the op's schema. Floating inputs have the spread of real
attention (a few tokens hold most of the mass), lengths are ragged and odd, K and V come in the
layouts that caches have, and every table of cases holds length 1 and rows with nothing valid.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One input of an op. `make(dtype, device)` returns the schema's positional arguments."""

    op: str
    name: str
    make: Callable[[torch.dtype, str], tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    mutates: int | None = None  # position of an argument that the op writes

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

    return Case("decode_attention", name, make, HALF_AND_FULL, mutates=7 if logits else None)


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

    return Case("decode_attention", name, make, HALF_AND_FULL, mutates=7 if logits else None)


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


def _to(device: str, *args) -> tuple:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


CASES: list[Case] = [
    *_decode_attention_cases(),
    *_merge_states_cases(),
    *_page_scores_cases(),
    *_select_pages_cases(),
]
