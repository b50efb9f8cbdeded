"""A generation through `generate`, with all that it and rare events of a method cost."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from decode.contenders import STOCK, Filling, contender
from decode.models import make_model, token_bytes
from harness.memory import free_memory
from ops.common import DTYPES


@dataclass(frozen=True)
class GenerationRow:
    """One generation each, one after the other: where machines are shared, less sure than steps."""

    part: str
    shape: str
    dtype: str
    batch: int
    tokens: int  # before it
    name: str
    generated: int
    ms: float  # per token, all but the first, which waits for slabs to grow
    ms_median: float
    speedup: float  # over stock, whose generation was the first
    parameters: str

    def line(self) -> str:
        return (
            f"{self.shape} {self.dtype} B={self.batch} n={self.tokens:<6} {self.name:14}"
            f" {self.generated} tokens, {self.ms:8.1f} ms each (median {self.ms_median:8.1f})"
            f"  stock {self.speedup:5.2f}x"
        )


def bench_generation(options: argparse.Namespace) -> Iterator[GenerationRow]:
    model = make_model(options.shape, DTYPES[options.dtype], options.device, options.seed)
    for batch in options.batch:
        for tokens in options.tokens:
            if 2 * batch * tokens * token_bytes(model) > free_memory(options.device):
                print(f"{options.shape} B={batch} n={tokens}: does not fit this memory")
                continue
            filling = Filling.make(model, batch, tokens, options.seed)
            stock = None
            for name in (STOCK, *options.method):
                player = contender(name, model, filling, options.generate + 1, options)
                clock = player.generate(options.generate)
                player.close()
                ms = (clock[-1] - clock[0]) * 1e3 / (len(clock) - 1)
                stock = stock or ms
                yield GenerationRow(
                    part="generate",
                    shape=options.shape,
                    dtype=options.dtype,
                    batch=batch,
                    tokens=tokens,
                    name=name,
                    generated=options.generate,
                    ms=ms,
                    ms_median=statistics.median(b - a for a, b in pairwise(clock)) * 1e3,
                    speedup=stock / ms,
                    parameters=player.parameters,
                )
