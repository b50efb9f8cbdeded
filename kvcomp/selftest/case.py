"""Case: one input of an op, and what cases are made with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One input of an op. `make(dtype, device)` returns the schema's positional arguments."""

    op: str
    name: str
    make: Callable[[torch.dtype, str], tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    mutates: tuple[int, ...] = ()  # positions of the arguments that the op writes
    # Overwrites what the op leaves unspecified in the arguments.
    blank: Callable[[Sequence], None] | None = None
    refused_by: tuple[str, ...] = ()  # implementations that do not take it
    # What output 0 of an implementation may err besides, given its name and the arguments, because
    # it rounds what it adds up.
    slack: Callable[[str, Sequence], float] | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


HALF_AND_FULL = (torch.float32, torch.float16, torch.bfloat16)
HALF_LOGITS = ("cpu",)  # backends that refuse them


def generator_for(*key) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def kv_cache(shape, dtype, generator, layout="head") -> Tensor:
    """[B, Hkv, T, D]: head-major, token-major ([B, T, Hkv, D] in memory), a slice of a slab, or
    crooked: no row is aligned to more than its elements."""
    batch, heads, slots, dim = shape
    if layout == "token":
        return torch.randn(batch, slots, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    if layout == "slab":
        spare = torch.randn(batch, heads, slots + 5, dim, generator=generator).to(dtype)
        return spare[:, :, :slots]
    if layout == "crooked":
        spare = torch.randn(batch, heads, slots, dim + 3, generator=generator).to(dtype)
        return spare[..., 1 : dim + 1]
    return torch.randn(*shape, generator=generator).to(dtype)


def attention_inputs(batch, heads, kv_heads, slots, dim, dtype, layout="head", peak=2.0):
    """q, k, v with logits of standard deviation `peak`, so that some tokens stand out."""
    generator = generator_for(batch, heads, kv_heads, slots, dim)
    q = (torch.randn(batch, dim, heads, generator=generator) * peak).to(dtype).transpose(1, 2)
    q = q.contiguous() if layout != "slab" else torch.cat([q, q], 1)[:, :heads]
    k = kv_cache((batch, kv_heads, slots, dim), dtype, generator, layout)
    v = kv_cache((batch, kv_heads, slots, dim), dtype, generator, layout)
    return q, k, v


def scored_logits(batch, heads, slots, generator, spare=0):
    """Logits [B, Hq, N] and the lse of their valid part, given seq_lens chosen here."""
    lens = torch.randint(1, slots + 1, (batch,), generator=generator).int()
    lens[-1] = slots
    logits = torch.randn(batch, heads, slots + spare, generator=generator) * 3
    valid = torch.arange(slots + spare) < lens[:, None, None]
    lse = logits.masked_fill(~valid, -torch.inf).logsumexp(-1)
    logits = logits.masked_fill(~valid, torch.nan)  # what lies past the end must not be read
    return logits, lse, lens


def ints(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on(device: str, *args) -> tuple:
    def move(a):
        if isinstance(a, list):
            return [move(item) for item in a]
        return a.to(device) if isinstance(a, Tensor) else a

    return tuple(move(a) for a in args)
