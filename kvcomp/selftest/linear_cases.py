"""Cases of linear layers, of norms and of rotary embeddings on few rows."""

from __future__ import annotations

import torch

from kvcomp.selftest.case import HALF_AND_FULL, Case, generator_for, on


def linear_cases() -> list[Case]:
    """Odd widths, weights and rows with gaps, up to 32 rows in one to three dimensions."""

    def build(name, rows, width, outputs, bias=True, gap=0, transposed=False):
        def make(dtype, device):
            generator = generator_for(name)
            x = torch.randn(*rows, width, generator=generator).to(dtype)
            if transposed:
                x = x.movedim(0, 1).contiguous().movedim(1, 0)
            weight = torch.randn(outputs, width + gap, generator=generator).to(dtype)[:, :width]
            shift = torch.randn(outputs, generator=generator).to(dtype) if bias else None
            return on(device, x, weight, shift)

        return Case("linear_rows", name, make, HALF_AND_FULL)

    return [
        build("one-number", (1,), 1, 1),
        build("one-vector", (), 40, 19),
        build("decode-step", (1, 1), 96, 130, bias=False),
        build("odd", (3,), 77, 21, gap=5),
        build("five-rows", (5,), 576, 35),
        build("eight-rows", (4, 2), 200, 33, transposed=True),
        build("sixteen-rows", (16,), 64, 48),
        build("many-rows", (29,), 200, 531),
        build("most-rows", (2, 16), 96, 64, bias=False),
        build("two-threads", (2, 1), 256, 1025),
        build("no-rows", (0, 1), 32, 8),
        build("no-outputs", (2,), 32, 0),
        build("no-width", (2,), 0, 5),
    ]


def norm_cases() -> list[Case]:
    """Odd widths, rows of zeros and rows so small that eps decides."""

    def build(name, rows, width, size=1.0, eps=1e-6):
        def make(dtype, device):
            generator = generator_for(name)
            x = (torch.randn(*rows, width, generator=generator) * size).to(dtype)
            weight = torch.randn(width, generator=generator).to(dtype)
            return (*on(device, x, weight), eps)

        return Case("norm_rows", name, make, HALF_AND_FULL)

    return [
        build("one-number", (1,), 1),
        build("one-vector", (), 40),
        build("decode-step", (1, 1), 576, eps=1e-5),
        build("heads", (2, 1, 4), 64),
        build("odd", (3,), 77),
        build("zeros", (2,), 96, size=0.0),
        build("small", (5,), 96, size=1e-3),
        build("large", (2,), 96, size=100.0),
        build("two-threads", (300,), 531),
        build("no-rows", (0, 1), 32),
    ]


def rotation_cases() -> list[Case]:
    """Heads split as models do, angles of all sequences or of each, and many tokens."""

    def build(name, batch, tokens, heads, kv_heads, dim, angles=1, inside=False):
        def make(dtype, device):
            generator = generator_for(name)

            def drawn(*shape):
                return torch.randn(shape, generator=generator).to(dtype)

            shape = (batch, tokens, heads + kv_heads, dim)
            both = drawn(*shape) if inside else drawn(batch, tokens, 2 * shape[2], dim)[:, :, ::2]
            q, k = both.transpose(1, 2).split([heads, kv_heads], 1)
            return on(device, q, k, drawn(angles, tokens, dim), drawn(angles, tokens, dim))

        return Case("rotate_rows", name, make, HALF_AND_FULL)

    return [
        build("one-head", 1, 1, 1, 1, 16),
        build("decode-step", 1, 1, 9, 3, 64, inside=True),
        build("rows", 3, 1, 4, 2, 80, angles=3),
        build("drafts", 2, 5, 7, 1, 128, angles=2, inside=True),
        build("shared", 3, 2, 2, 2, 48),
        build("largest", 1, 2, 1, 1, 1024),
        build("two-threads", 2, 300, 4, 2, 96, angles=2),
        build("no-tokens", 2, 0, 2, 1, 32),
    ]
