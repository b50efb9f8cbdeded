"""linear_rows: the linear layers of a decode step, one by one and all of a model's in turn.
norm_rows: its RMS norms."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from harness.contenders import Against, Contender, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from ops.common import DTYPES, plain_contenders


class Sizes(NamedTuple):
    """Weights [outputs, width] of one layer, how many layers there are, and of the head."""

    layer: tuple[tuple[int, int], ...]
    num_layers: int
    head: tuple[int, int]

    @property
    def different(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys([*self.layer, self.head]))

    @property
    def all(self) -> list[tuple[int, int]]:
        return [*self.layer * self.num_layers, self.head]


MODELS = {
    "SmolLM2-135M": Sizes(
        ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)),
        30,
        (49152, 576),
    ),
    "Qwen3-0.6B": Sizes(
        (
            *((2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048)),
            *((3072, 1024), (3072, 1024), (1024, 3072)),
        ),
        28,
        (151936, 1024),
    ),
}
ROWS = (1, 4, 8, 16, 32)
NORMS = ((1, 576), (1, 1024), (8, 576), (16, 128), (32, 4096))  # rows and their width
SMOKE = {"two layers": Sizes(((96, 64), (64, 96)), 2, (300, 64))}


def bench_linear_rows(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: a step reads every other weight before it comes back to one."""
    for name, sizes in (SMOKE if options.smoke else MODELS).items():
        for dtype in options.dtype:
            for rows in ROWS:
                for outputs, width in sizes.different:
                    yield _bench_layer(rows, outputs, width, dtype, run)
                yield _bench_step(name, sizes, rows, dtype, run)


def _bench_layer(rows: int, outputs: int, width: int, dtype: str, run: Settings) -> list[Row]:
    moved = outputs * width * DTYPES[dtype].itemsize
    sets = [
        (*_layer(rows, outputs, width, dtype, run.device), None) for _ in range(run.num_sets(moved))
    ]
    baselines = {"torch-linear": lambda x: linear(*x)}
    contenders = plain_contenders("linear_rows", sets[0], moved, baselines, run)
    shape = f"{rows} x {outputs}x{width}"
    return measure("linear_rows", shape, dtype, sets, contenders, run)


def _bench_step(name: str, sizes: Sizes, rows: int, dtype: str, run: Settings) -> list[Row]:
    """Unchecked: the layers have been checked one by one."""
    layers = [_layer(rows, *size, dtype, run.device) for size in sizes.all]
    moved = sum(weight.nbytes for _, weight in layers)
    contenders = [
        Contender(
            "torch-linear",
            lambda layers: [linear(x, weight) for x, weight in layers],
            moved,
            ours=False,
        )
    ]
    for impl in implementations("linear_rows", run.device, moved):
        call = OPS["linear_rows"].impl(impl)
        contenders.append(
            Contender(
                impl,
                lambda layers, call=call: [call(x, weight, None) for x, weight in layers],
                moved,
                against=(Against("torch-linear", "torch-linear"),),
            )
        )
    shape = f"{rows} x all of {name}, {moved / 1e6:.0f} MB"
    return measure("linear_rows", shape, dtype, [layers], contenders, run)


def _layer(rows: int, outputs: int, width: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, width, device=device).to(DTYPES[dtype])
    return x, (torch.randn(outputs, width, device=device) * width**-0.5).to(DTYPES[dtype])


def bench_norm_rows(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Beside the six ops of transformers' layers, and torch's one."""
    for dtype in options.dtype:
        for rows, width in ((2, 64),) if options.smoke else NORMS:
            moved = (2 * rows + 1) * width * DTYPES[dtype].itemsize
            shapes = (rows, width), (width,)
            x, weight = (torch.randn(*n, device=run.device).to(DTYPES[dtype]) for n in shapes)
            baselines = {
                "six ops": lambda sets: _six_ops(*sets),
                "torch-rms_norm": lambda sets: rms_norm(sets[0], sets[1].shape, *sets[1:]),
            }
            sets = [(x, weight, 1e-6)]
            contenders = plain_contenders("norm_rows", sets[0], moved, baselines, run)
            yield measure("norm_rows", f"{rows} x {width}", dtype, sets, contenders, run)


def _six_ops(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def bench_rotate_rows(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """A token of one and of eight sequences, beside the sixteen ops of transformers' models."""
    heads, kv_heads, dim = options.shape[0]
    for batch in (1, 8):
        for dtype in options.dtype:
            shapes = [(batch, 1, heads, dim), (batch, 1, kv_heads, dim), *[(batch, 1, dim)] * 2]
            q, k, cos, sin = (torch.randn(*x, device=run.device).to(DTYPES[dtype]) for x in shapes)
            sets = [(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
            moved = 2 * (q.nbytes + k.nbytes + cos.nbytes)
            baselines = {"sixteen ops": lambda sets: _sixteen_ops(*sets)}
            contenders = plain_contenders("rotate_rows", sets[0], moved, baselines, run)
            shape = f"B={batch} H={heads}/{kv_heads}x{dim}"
            yield measure("rotate_rows", shape, dtype, sets, contenders, run)


def _sixteen_ops(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
