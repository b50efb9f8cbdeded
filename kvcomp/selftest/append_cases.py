"""Cases of new tokens that go behind those of each sequence."""

from __future__ import annotations

import torch

from kvcomp.selftest.case import HALF_AND_FULL, Case, generator_for, ints, kv_cache, on

WRITTEN = (2, 3, 4)  # the caches and seq_lens; then what is optional
LOGICAL, CACHED_WORDS = 5, 7


def append_cases() -> list[Case]:
    def build(name, lens, count, heads, slots, dim, value_dim=None, **options):
        """Options: how K and V lie (`layout`), how the cache lies (`cache`), `added`, `logical` and
        `coded`."""
        sides = (dim, dim if value_dim is None else value_dim)

        def make(dtype, device):
            batch, generator = len(lens), generator_for(name)
            rows = [_rows(batch, heads, count, x, options.get("layout"), generator) for x in sides]
            layout = options.get("cache", "head")
            caches = [
                kv_cache((batch, heads, slots, x), torch.float32, generator, layout) for x in sides
            ]
            dtype = torch.int8 if options.get("coded") else dtype
            args = [_as(x, dtype) for x in (*rows, *caches)] + [ints(lens), None, None, None, None]
            if options.get("logical"):
                args[LOGICAL] = ints([length + 7 for length in lens])
            if options.get("coded"):
                for place, shape in ((6, (batch, heads, count)), (7, (batch, heads, slots))):
                    args[place] = torch.randint(-99, 99, shape, generator=generator).int()
            if "added" in options:
                args[8] = ints(options["added"])
            return on(device, *args)

        written = WRITTEN + (LOGICAL,) * ("logical" in options)
        written += (CACHED_WORDS,) * ("coded" in options)
        dtypes = (torch.float32,) if options.get("coded") else HALF_AND_FULL
        return Case("append_rows", name, make, dtypes, written)

    return [
        build("one-token", [0], 1, 1, 1, 16),
        build("step", [6, 0, 39], 1, 3, 40, 64, layout="model", logical=True),
        build("odd", [5, 1], 3, 2, 9, 33, layout="columns", cache="crooked"),
        build("some", [3, 0, 4, 7], 4, 2, 9, 24, added=[0, 4, 1, 2], logical=True, cache="token"),
        build("prompt", [0, 0], 300, 2, 301, 128, added=[300, 299], cache="slab"),
        build("no-v", [2, 8], 1, 1, 9, 72, value_dim=0),
        build("unlike", [2, 8], 2, 5, 10, 48, value_dim=32, layout="model"),
        build("codes", [2, 0, 8], 2, 3, 10, 80, coded=True, logical=True),
        build("codes-some", [2, 8], 2, 1, 10, 16, coded=True, added=[1, 2]),
    ]


def _rows(batch, heads, count, dim, layout, generator):
    """[B, H, m, D]; as models make them by splitting heads, or with columns that lie apart."""
    if layout == "model":
        whole = torch.randn(batch, count, heads + 1, dim, generator=generator)
        return whole[:, :, 1:].transpose(1, 2)
    if layout == "columns":
        return torch.randn(batch, heads, dim, count, generator=generator).transpose(2, 3)
    return torch.randn(batch, heads, count, dim, generator=generator)


def _as(x, dtype):
    """x in another dtype, with its strides."""
    wide = (x * 20).to(dtype) if dtype == torch.int8 else x.to(dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(wide) if x.numel() else wide
