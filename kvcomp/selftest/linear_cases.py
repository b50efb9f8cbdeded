"""Cases of linear layers and of norms on few rows."""

from __future__ import annotations

import torch

from kvcomp.selftest.case import HALF_AND_FULL, Case, generator_for, on


def linear_cases() -> list[Case]:
    """Odd widths, weights and rows with gaps, up to 29 rows in one to three dimensions."""

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
        build("many-rows", (29,), 200, 531),
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
