"""What stays on the device of a whole model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kvcomp
from harness.memory import Memory
from kvcomp.cache import KVCache
from ops.common import DTYPES


@dataclass(frozen=True)
class MemoryRow:
    """Bytes, all layers; shares are of dense K and V of the tokens seen."""

    part: str
    when: str
    dtype: str
    tokens: int
    dense: int
    slots: int  # K and V of tokens on the device
    slots_allocated: int  # with spare capacity
    index: int  # digests and bounds of the units, spare capacity included
    tracking: int  # which token a slot holds, and other notes
    host: int
    held: int  # by all tensors that are alive, less those in host memory
    share: float  # slots, index and tracking
    held_share: float

    def line(self) -> str:
        mb = {n: getattr(self, n) / 1e6 for n in ("dense", "slots", "index", "tracking", "host")}
        parts = "  ".join(f"{name} {value:.1f}" for name, value in mb.items())
        return (
            f"{self.dtype}  {self.when:14} MB: {parts}  on the device {self.share:.1%} of dense;"
            f" tensors held {self.held / 1e6:.1f} MB, {self.held_share:.1%}"
        )


def bench_memory(options: argparse.Namespace) -> Iterator[MemoryRow]:
    """K and V are random, and alike in all layers: nobody asks what is in them."""
    fields = {"budget": 128, "sinks": 4, "local": 32} if options.smoke else {}
    method = kvcomp.LouisKV(iterations=1, **fields)  # how often: that changes no size
    name = options.dtype[0]
    heads, kv_heads, dim = 16, 8, 128  # of Qwen3-0.6B
    layers, generator = options.memory_layers, torch.Generator().manual_seed(options.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(options.device, DTYPES[name])

    k, v = normal(kv_heads, options.prompt, dim), normal(kv_heads, options.prompt, dim)
    steps = [(normal(heads, dim), normal(kv_heads, 1, dim)) for _ in range(options.steps)]
    memory = Memory(options.device)
    cache = KVCache(method, layers)
    for layer in cache.layers:
        layer.append(k, v)
        cache.prefill(layer, steps[0][0][:, :, None], dim**-0.5)
    for layer in cache.layers:
        layer.settle()
    cache.meter.observe(cache)
    yield _memory_row("prompt", name, cache, memory)
    for q, new in steps:
        for layer in cache.layers:
            layer.append(new, new)
            cache.attend(layer, q, dim**-0.5)
    yield _memory_row(f"{len(steps)} steps later", name, cache, memory)


def _memory_row(when: str, dtype: str, cache: KVCache, memory: Memory) -> MemoryRow:
    meter, seen = cache.meter, cache.layers[0].columns
    dense = sum(layer.token_bytes * seen for layer in cache.layers)
    index = sum(layer.hosted.index.nbytes for layer in cache.layers if layer.is_hosted)
    host = meter.peak_host_bytes
    held, _ = memory.look()
    held -= host if memory.device == "cpu" else 0  # the pools are tensors too
    return MemoryRow(
        part="memory",
        when=when,
        dtype=dtype,
        tokens=seen,
        dense=dense,
        slots=meter.peak_bytes,
        slots_allocated=meter.allocated_bytes,
        index=index,
        tracking=meter.peak_note_bytes - index,
        host=host,
        held=held,
        share=(meter.peak_bytes + meter.peak_note_bytes) / dense,
        held_share=held / dense,
    )
