"""K and V in eight bits: what making them costs, and attention over them beside 16 bits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from harness.contenders import KERNELS, Against, Contender, Expected, Settings, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.probe import copy_probe
from ops.attention import Attention, Shape, Variant, attend, attention_sets, variants
from ops.common import DTYPES, plain_contenders

HALF = ("bf16", "fp16")


def bench_quantize_rows(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: a prompt's rows, K turned."""
    run = replace(run, probe=copy_probe(run.device, run.probe.bytes))
    _, heads, dim = options.shape[0]
    for tokens in options.tokens:
        for dtype in options.dtype:
            read = 2 * heads * tokens * dim * DTYPES[dtype].itemsize
            moved = read + heads * tokens * (2 * dim + 4)
            sets = [
                _rows(heads, tokens, dim, DTYPES[dtype], run.device)
                for _ in range(run.num_sets(read))
            ]
            contenders = plain_contenders(
                "quantize_rows", sets[0], moved, {"torch": _torch_rows}, run, written=(2, 3, 4)
            )
            shape = f"B=1 H={heads}x{dim} n={tokens}"
            yield measure("quantize_rows", shape, dtype, sets, contenders, run)


def _rows(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> tuple:
    k, v = (torch.randn(1, heads, tokens, dim).to(device, dtype) for _ in range(2))
    return k, v, *coded(k, v), False


def coded(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and words of k and v [B, Hkv, T, D]."""
    codes = [
        torch.empty_strided(x.shape, x.stride(), dtype=torch.int8, device=x.device) for x in (k, v)
    ]
    words = k.new_empty(k.shape[:3], dtype=torch.int32)
    OPS["quantize_rows"].reference(k, v, *codes, words, False)
    return *codes, words


def _torch_rows(x: tuple) -> None:
    """In operations of torch."""
    OPS["quantize_rows"].reference(*x)


def bench_hadamard(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: the queries of a step have just been computed."""
    heads, _, dim = options.shape[0]
    for dtype in options.dtype:
        for batch in (1, 64):
            x = torch.randn(batch, heads, dim).to(run.device, DTYPES[dtype])
            matrix = OPS["hadamard"].reference(torch.eye(dim)).to(x)
            baselines = {"matmul": lambda x, matrix=matrix: x[0] @ matrix}
            contenders = plain_contenders("hadamard", (x,), 2 * x.nbytes, baselines, run)
            shape = f"B={batch} {heads}x{dim}"
            yield measure("hadamard", shape, dtype, [(x,)] * 2, contenders, run)


# --- attention ------------------------------------------------------------------------------------


class Both(NamedTuple):
    """The same inputs in 16 bits and in eight."""

    plain: Attention
    codes: Attention
    words: Tensor


def bench_eight_bits(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold. K and V in eight bits against the same kernel over the same tokens in 16.

    Sets that share K and V in 16 bits share their codes too: both lie in as many places, so that
    neither pays for more address translations.
    """
    for heads, kv_heads, dim in options.shape:
        for tokens in options.tokens:
            for dtype in (name for name in HALF if name in options.dtype):
                shape = Shape(options.batch[0], heads, kv_heads, dim, tokens, DTYPES[dtype])
                row = shape.batch * tokens * row_bytes(shape)
                plain = attention_sets(
                    shape, min(options.budget, tokens), run, copies=run.num_sets(row)
                )
                codes = {x.k.data_ptr(): coded(x.k, x.v) for x in reversed(plain)}
                sets = [_both(x, *codes[x.k.data_ptr()]) for x in plain]
                contenders = list(_contenders(shape, options.budget, sets[0], run))
                yield measure("eight_bits", str(shape), dtype, sets, contenders, run)


def row_bytes(shape: Shape) -> int:
    """Of a token in eight bits: codes of K and V and the word, of all KV heads."""
    return shape.kv_heads * (2 * shape.dim + 4)


def _both(x: Attention, k: Tensor, v: Tensor, words: Tensor) -> Both:
    return Both(x, x._replace(k=k, v=v), words)


def _contenders(shape: Shape, budget: int, x: Both, run: Settings) -> Iterator[Contender]:
    row = row_bytes(shape)
    for v in variants(shape, budget, x.plain.logits.nbytes):
        if v.token_major:
            continue
        kv = shape.kv_bytes(1)
        tokens = shape.batch * min(shape.tokens, budget if v.ideal > 1 else shape.tokens)
        small = v.num_bytes - tokens * (kv - row)
        for name in KERNELS[run.device]:
            yield Contender(f"{name} 16", partial(_in_16, name, shape, v), v.num_bytes, v.name)
            against = Against("16 bits", f"{name} 16 {v.name}".strip(), v.num_bytes / small)
            expected = Expected(
                partial(_referred, shape, v), (*x.codes, x.words), ids_may_differ=0.02
            )
            call = partial(_in_8, name, shape, v)
            yield Contender(f"{name} 8", call, small, v.name, expected, against=(against,))


def _in_16(name: str, shape: Shape, variant: Variant, x: Both) -> tuple:
    return attend(_implementations(name), shape, variant, x.plain)


def _in_8(name: str, shape: Shape, variant: Variant, x: Both) -> tuple:
    return _attend(_implementations(name), shape, variant, x)


def _referred(shape: Shape, variant: Variant, *fields: Tensor) -> tuple:
    use = {op: choice.reference for op, choice in OPS.items()}
    return _attend(use, shape, variant, Both(None, Attention(*fields[:-1]), fields[-1]))


def _implementations(name: str) -> dict[str, Callable]:
    return {op: choice.impls.get(name) or choice.reference for op, choice in OPS.items()}


def _attend(use: dict[str, Callable], shape: Shape, variant: Variant, x: Both) -> tuple:
    with_words = {op: (lambda *args, op=op: use[op](*args, x.words)) for op in use}
    return attend(with_words, shape, variant, x.codes)
