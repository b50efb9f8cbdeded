"""Cases of attention over latents."""

from __future__ import annotations

import torch

from kvcomp.selftest.case import HALF_AND_FULL, Case, generator_for, ints, kv_cache, on


def latent_cases() -> list[Case]:
    def build(
        name,
        lens,
        heads,
        slots,
        dim,
        value_dim,
        page_size=0,
        listed=0,
        holes=False,
        layout="head",
        logits=False,
        peak=2.0,
    ):
        """page_size 0: dense; else `listed` pages, in any order."""

        def make(dtype, device):
            batch, generator = len(lens), generator_for(name)
            q = (torch.randn(batch, dim, heads, generator=generator) * peak).to(dtype)
            rows = kv_cache((batch, 1, slots, dim), dtype, generator, layout)[:, 0]
            page_ids, room = None, slots
            if page_size:
                order = torch.rand(batch, 1, slots // page_size, generator=generator).argsort(-1)
                page_ids, room = order[..., :listed].int(), listed * page_size
                if holes:
                    page_ids[:, :, ::3] = -1
                    page_ids[0] = -1
            q = q.transpose(1, 2).contiguous()
            buffer = torch.full((batch, heads, room + 3), torch.nan) if logits else None
            where = page_ids, max(page_size, 1), value_dim
            return on(device, q, rows, ints(lens), *where, dim**-0.5, buffer)

        if not logits:
            return Case("latent_attention", name, make, HALF_AND_FULL)
        return Case("latent_attention", name, make, HALF_AND_FULL, (7,), unattended)

    def unattended(args):
        args[7][~args[7].isfinite()] = 0  # left alone or -inf

    return [
        build("one-token", [1], 1, 1, 32, 16),
        build("ragged", [131, 1, 77], 16, 131, 96, 64),
        build("empty-row", [0, 39], 7, 40, 48, 32),
        build("no-rotated-part", [70], 4, 70, 64, 64, layout="crooked"),
        build("odd-heads", [66, 70], 23, 70, 80, 48, layout="slab", logits=True),
        build("deepseek", [333], 16, 333, 576, 512),
        build("wide", [40], 19, 40, 656, 640, logits=True),
        build("spans", [4500, 300], 3, 4500, 48, 32, logits=True),
        build("tokens", [37, 5], 20, 90, 64, 32, 1, 40, logits=True),
        build("pages", [96, 50], 8, 330, 128, 96, 16, 6, layout="slab"),
        build("holes", [80, 80], 5, 260, 64, 48, 32, 5, holes=True, logits=True),
    ]
