"""Cases of what engines ask of the ops: slots of a pool, pages of a table, bounded lengths."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcomp.ops.decode_attention import NO_BOUND
from kvcomp.selftest.attention_cases import attention_cases
from kvcomp.selftest.case import HALF_AND_FULL, Case, generator_for, on

LISTED = {  # op -> the cases of it that are taken with pages of a table, too
    "select_pages": ("ragged", "per-head-sinks", "fits", "empty-row", "many-pages-tied"),
    "attend_and_select": ("table", "pool"),
}
BOUNDED = {  # op -> the cases of it that are taken with a bound of their lengths, too
    "decode_attention": ("odd-ragged", "long-row", "pages16-per-head", "pool-heads-inside"),
    "append_attention": ("odd-ragged", "pool"),
    "attend_and_select": ("splits", "table"),
}
LENGTHS = 3  # of the ops with a bound, which argument they are


def _store_slots_cases() -> list[Case]:
    def build(name, tokens, heads, pages, size, dim, order, value_dim=None, coded=False):
        """A pool that `order` says how memory has: N pages, P tokens, H heads, and C, which is K
        and then V of a head."""
        columns = [dim, dim if value_dim is None else value_dim]

        def make(dtype, device):
            dtype = torch.int8 if coded else dtype
            generator = generator_for(name)

            def drawn(*shape):
                return (torch.randn(shape, generator=generator) * 20).to(dtype)

            rows = drawn(tokens, heads + 1, sum(columns))[:, 1:]
            k, v = rows.split(columns, -1)
            sizes = {"N": pages, "P": size, "H": heads, "C": sum(columns)}
            cache = drawn(*(sizes[x] for x in order)).permute([order.index(x) for x in "NHPC"])
            slots = torch.randperm(pages * size, generator=generator)[:tokens]
            slots[1::3] = -torch.arange(1, len(slots[1::3]) + 1)
            return on(device, k, v, *cache.split(columns, -1), slots)

        dtypes = (torch.float32,) if coded else HALF_AND_FULL
        return Case("store_slots", name, make, dtypes, (2, 3))

    return [
        build("one-token", 1, 1, 1, 1, 16, "NHPC"),
        build("heads-inside", 7, 3, 4, 16, 64, "NPHC"),
        build("heads-outside", 40, 2, 5, 16, 128, "HNPC"),
        build("most-heads", 5, 33, 3, 4, 256, "NHPC"),
        build("unlike", 9, 2, 6, 8, 192, "NPHC", value_dim=128),
        build("no-v", 9, 1, 6, 8, 576, "NPHC", value_dim=0),
        build("codes", 11, 2, 3, 16, 80, "NHPC", coded=True),
    ]


def _listed(case: Case) -> Case:
    """The same, with the pages of the columns that it selects."""
    selects = case.op == "select_pages"

    def make(dtype, device):
        args = list(case.make(dtype, "cpu"))
        if selects:
            scores, count = args[0], args[3]
            batch, sets, width = scores.shape
            generator = generator_for(case.name)
            shape = (batch, sets, width + 3) if sets > 1 else (batch, width)
            table = torch.randint(1000, shape, generator=generator).int()
            table[0, ..., 0] = -1  # a hole stays one
            args.append(table)
        else:
            sets, count = args[9], args[6]
            args += [None, None, None, 0.0, NO_BOUND, False]
        pages = torch.full((len(args[0]), sets, count), 7, dtype=torch.int32)
        return on(device, *args, pages)

    written = 7 if selects else 19
    return replace(case, name=f"{case.name}-pages", make=make, mutates=(*case.mutates, written))


def _bounded(case: Case) -> Case:
    """The same, its lengths known not to pass the longest, and checked by someone before."""

    def make(dtype, device):
        args = case.make(dtype, device)
        given = 13 if case.op == "attend_and_select" else 8 if case.op == "decode_attention" else 10
        optional = (*args[given:], *(None, None, None, 0.0)[len(args) - given :])
        return *args[:given], *optional, int(args[LENGTHS].max()), True

    return replace(case, name=f"{case.name}-bounded", make=make)


def engine_cases() -> list[Case]:
    cases = attention_cases()
    return [
        *(_bounded(x) for x in cases if x.name in BOUNDED.get(x.op, ())),
        *(_listed(x) for x in cases if x.name in LISTED.get(x.op, ())),
        *_store_slots_cases(),
    ]
