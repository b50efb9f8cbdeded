"""Cases of attention over K and V, also where it selects pages."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcomp.selftest.case import (
    HALF_AND_FULL,
    HALF_LOGITS,
    Case,
    attention_inputs,
    generator_for,
    ints,
    kv_cache,
    on,
)


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


def _pool(name, batch, heads, kv_heads, pages, dim, page_size, order, logits=None, given="ol"):
    """A pool of pages that `order` says how memory has, as vLLM calls it: N pages, P tokens, H
    heads, and C, which is K and then V of a head; L: of two layers. `given`: of out and lse."""

    def make(dtype, device):
        generator = generator_for(name)
        sizes = {"L": 2, "N": pages, "P": page_size, "H": kv_heads, "C": 2 * dim}
        cache = torch.randn([sizes[x] for x in order], generator=generator).to(dtype)
        cache = cache.permute([order.index(x) for x in "LNHPC" if x in order])
        k, v = (cache[-1] if "L" in order else cache).split(dim, -1)
        q = (torch.randn(batch, heads, dim, generator=generator) * 2).to(dtype)
        table = torch.randint(pages, (batch, 5), generator=generator).int()
        table[:, 1] = torch.tensor([-1, *range(1, batch)])
        lens = torch.randint(1, 5 * page_size, (batch,), generator=generator).int()
        lens[-1] = 4 * page_size
        table[-1, -1] = 1 << 30  # behind the end of a row anything may be
        buffer = _room(batch, heads, 5 * page_size, dtype=logits)
        out = torch.full_like(q, torch.nan) if "o" in given else None
        lse = torch.full((batch, heads), torch.nan) if "l" in given else None
        scale = dim**-0.5
        return on(device, q, k, v, lens, table, page_size, scale, buffer, None, out, lse)

    case = _attention_case(name, make, logits)
    return replace(case, mutates=(*case.mutates, *(9 + "ol".index(x) for x in given)))


def _narrow(case: Case) -> Case:
    """The same with heads of 192 whose V has 128 columns."""

    def make(dtype, device):
        q, k, v, *rest = case.make(dtype, device)
        return q, k, v[..., :128], *rest

    return replace(case, make=make)


def _room(*shape, dtype) -> torch.Tensor | None:
    """Unwritten logits; None where no dtype asks for them."""
    return None if dtype is None else torch.full(shape, torch.nan, dtype=dtype)


def _attention_case(name, make, logits, op="decode_attention") -> Case:
    at = {"decode_attention": 7, "append_attention": 9}[op]

    def unattended(args):
        args[at][~args[at].isfinite()] = 0  # left alone or -inf
        if half:
            args[at].clamp_(-65504, 65504)  # of fp16

    if logits is None:
        return Case(op, name, make, HALF_AND_FULL)
    half = logits == torch.float16
    return Case(op, name, make, HALF_AND_FULL, (at,), unattended, HALF_LOGITS if half else ())


def _decode_attention_cases() -> list[Case]:
    dense = [
        _dense("one-token", 1, 1, 1, 1, 64, [1]),
        _dense("odd-ragged", 3, 8, 2, 131, 64, [131, 1, 77]),
        _dense("empty-row", 2, 4, 4, 40, 32, [0, 39]),
        _dense("group7-token-major", 2, 14, 2, 203, 128, [203, 64], layout="token"),
        _dense("slab", 2, 4, 1, 65, 80, [65, 33], layout="slab"),
        _dense("dim96", 1, 3, 3, 50, 96, [47]),
        _dense("dim256", 1, 4, 2, 70, 256, [70]),
        _narrow(_dense("unlike", 2, 6, 2, 131, 192, [131, 7], logits=torch.float32)),
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
        _narrow(_paged("unlike-pages", 2, 4, 2, 100, 192, 16, 5, False, "token")),
        _paged("pages32-holes", 3, 4, 2, 260, 64, 32, 5, shared=False, holes=True),
        _paged("pages64-logits", 2, 4, 1, 400, 80, 64, 3, shared=True, logits=torch.float32),
        _paged("holes-half-logits", 3, 4, 2, 90, 64, 16, 5, False, "head", True, torch.float16),
    ]
    pools = [
        _pool("pool-heads-inside", 2, 8, 2, 9, 64, 16, "NPHC"),
        _pool("pool-heads-outside", 3, 4, 2, 9, 32, 16, "NHPC", logits=torch.float32),
        _pool("pool-all-heads-first", 2, 4, 4, 7, 80, 8, "HNPC", given="o"),
        _pool("pool-blocks-outermost", 2, 6, 3, 8, 128, 16, "NLPHC", given="l"),
        _pool("pool-blocks-outermost-heads", 2, 4, 2, 8, 64, 4, "NHLPC"),
        _pool("pool-tokens", 2, 4, 2, 40, 64, 1, "NHPC", given=""),
    ]
    return dense + paged + pools


def _append_attention_cases() -> list[Case]:
    def build(
        name,
        count,
        heads,
        kv_heads,
        slots,
        dim,
        lens,
        q_lens=None,
        tree=False,
        page_size=0,
        shared=True,
        layout="head",
        logits=None,
        pool=0,
    ):
        """page_size 0: dense; else all pages, in any order; or a table of a pool of so many."""

        def make(dtype, device):
            batch, generator = len(lens), generator_for(name)
            q, k, v = attention_inputs(batch, heads * count, kv_heads, slots, dim, dtype, layout)
            # As ops give it, and as models do.
            q = q.unflatten(1, (count, heads)) if layout == "head" else q.unflatten(1, (heads, -1))
            q = q if layout == "head" else q.transpose(1, 2)
            page_ids = None
            if page_size:
                sets = torch.rand(
                    batch, 1 if shared else kv_heads, slots // page_size, generator=generator
                )
                page_ids = sets.argsort(-1).int()
            if pool:
                k, v = (
                    kv_cache((pool, kv_heads, page_size, dim), dtype, generator, "token")
                    for _ in "kv"
                )
                page_ids = page_ids[:, 0] % pool
            tail = None
            if tree:
                tail = torch.randint(-(2**63), 2**63 - 1, (batch, count), generator=generator)
                tail[0, 0] = 0  # nothing of the new ones
            given = None if q_lens is None else ints(q_lens)
            buffer = _room(batch, count, heads, slots + 3, dtype=logits)
            where = page_ids, max(page_size, 1)
            return on(device, q, k, v, ints(lens), given, tail, *where, dim**-0.5, buffer)

        return _attention_case(name, make, logits, "append_attention")

    return [
        build("one-token", 1, 1, 1, 1, 64, [1]),
        build("all-new", 5, 4, 2, 5, 32, [5]),
        build("odd-ragged", 3, 6, 2, 131, 64, [131, 3, 77]),
        build("tree", 9, 4, 2, 100, 80, [100, 9, 64], tree=True, layout="slab"),
        build("ragged-queries", 7, 4, 1, 150, 64, [150, 7, 4, 0], [7, 3, 0, 0], layout="token"),
        build("ragged-tree", 12, 2, 2, 90, 96, [90, 20], [12, 5], tree=True),
        build("most", 64, 4, 2, 300, 32, [300, 64], [64, 63], tree=True, logits=torch.float32),
        build("many-rows", 11, 20, 1, 530, 64, [530, 260], layout="slab"),
        build("over-spans", 6, 2, 1, 1030, 128, [1030, 515, 1027], logits=torch.float32),
        build("over-odd-spans", 4, 3, 1, 970, 80, [970, 481, 480]),
        build("pages", 5, 4, 2, 96, 64, [96, 6], page_size=16, logits=torch.float32),
        build("tokens-by-head", 4, 4, 2, 70, 64, [70, 9], None, True, 1, shared=False),
        build("pool", 5, 4, 2, 96, 64, [96, 6], page_size=16, pool=4),
        build("wide", 3, 4, 2, 70, 256, [70, 33], page_size=7, layout="token"),
        _narrow(build("unlike", 5, 6, 2, 96, 192, [96, 6], page_size=16)),
        build("half-logits", 4, 4, 2, 80, 64, [80, 41], tree=True, logits=torch.float16),
    ]


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
        pool=0,
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
            if pool:
                shape, generator = (pool, kv_heads, page_size, dim), generator_for(name, pool)
                k, v = (kv_cache(shape, dtype, generator, layout) for _ in "kv")
                assert page_ids is not None
                page_ids = page_ids[:, 0] % pool
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
        build("pool", [90, 33], 4, 2, 96, 64, 16, 3, layout="token", listed=6, pool=5),
        _narrow(build("unlike", [90, 33], 4, 2, 96, 192, 16, 3)),
        build("splits", [601, 300], 6, 2, 601, 64, 16, 9, recent=3, sink=2),
        build("fits", [90, 31, 0], 4, 4, 96, 80, 16, 8, recent=8),
        build("sets-by-mass", [301, 9], 6, 2, 301, 32, 4, 20, 2, groups=2, use_max=False),
        build("tokens", [290, 133], 20, 1, 290, 64, 1, 90, recent=8, sink=4, layout="token"),
        build("table", [150, 77], 8, 2, 320, 64, 16, 6, listed=10),
        build("many-heads", [100], 18, 6, 100, 128, 32, 2, layout="slab"),
        build("half-logits", [600, 301], 6, 2, 600, 64, 16, 9, recent=3, sink=2, half=True),
    ]


def _capped(case: Case, softcap: float) -> Case:
    """The same with a soft cap of the logits."""

    def make(dtype, device):
        return *case.make(dtype, device), None, None, None, softcap

    return replace(case, name=f"{case.name}-softcap", make=make)


CAPPED = {
    "decode_attention": ({"logits", "long-row", "pages32-holes"}, 3.0),
    "append_attention": ({"most", "tree"}, 3.0),
    "attend_and_select": ({"splits"}, 20.0),  # a lower one makes ties of what is selected
}


def attention_cases() -> list[Case]:
    cases = _all_cases()
    chosen = [case for case in cases if case.name in CAPPED.get(case.op, ((),))[0]]
    return cases + [_capped(case, CAPPED[case.op][1]) for case in chosen]


def _all_cases() -> list[Case]:
    return [
        *_append_attention_cases(),
        *_attend_and_select_cases(),
        *_decode_attention_cases(),
        *_merge_states_cases(),
    ]
