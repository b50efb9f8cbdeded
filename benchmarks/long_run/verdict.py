"""What must hold of a long run, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcomp import Delethink, Method
from kvcomp.cache import host_pool
from kvcomp.cache.slab import FIRST_CAPACITY, GROWTH
from kvcomp.methods.eviction import Eviction
from kvcomp.methods.retrieval import Retrieval
from long_run.first_layer import PRECISION

OBJECTS = 64  # more that the garbage collector may know of; and for blocks of host memory:
HOST_OBJECTS = 128
BLOCKS = 512  # more of memory that Python may have handed out
OTHER = 2**20  # bytes of tensors that are neither K and V nor notes: small ones, logits of a step


@dataclass(frozen=True)
class Bounds:
    """Most tokens of a layer on the device, None: all; for how many its slabs have room; for how
    many there may be host memory, beside those seen."""

    kept: int | None
    spare: float = GROWTH
    host: float = 0.0

    @classmethod
    def of(cls, method: Method, prompt: int) -> Bounds:
        if isinstance(method, Delethink):
            return cls(prompt + method.most_thought)
        if isinstance(method, Eviction):
            return cls(max(method.budget, prompt) + method.window, spare=1.0)
        if isinstance(method, Retrieval):
            return cls(method.most_resident, spare=1.0, host=1 + host_pool.GROWTH)
        return cls(None)


def faults(method: Method, prompt: int, token_bytes: int, rows: list[dict]) -> Iterator[str]:
    """What is wrong with the notes of a run, in words.

    Args:
        prompt: its tokens.
        token_bytes: of K and V of one token, all layers.
        rows: four or more. Where nothing may grow, the second half is compared with the second
            quarter.
    """
    bounds = Bounds.of(method, prompt)
    for row in rows:
        for fault in (*_places(prompt, row), *_bytes(bounds, prompt, token_bytes, row)):
            yield f"at {row['tokens']} tokens: {fault}"
    yield from _growth(bounds, rows)


def _places(prompt: int, row: dict) -> Iterator[str]:
    if row["seen"] != prompt + row["tokens"]:
        yield f"the cache has seen {row['seen']} tokens, it says"
    if row["drift"]:
        yield f"positions are off by {row['drift']}"
    if row["error"] > PRECISION:
        yield f"of {row['rows']} rows of the first layer one is off by {row['error']:.1%}"
    if row["rows"] and row["shifted"] <= PRECISION:
        yield f"of {row['rows']} rows one could not be told from that of the next position"


def _bytes(bounds: Bounds, prompt: int, token_bytes: int, row: dict) -> Iterator[str]:
    seen = prompt + row["tokens"]
    most = seen if bounds.kept is None else min(bounds.kept, seen)
    if row["kept"] > most or row["held"] > most * token_bytes:
        yield f"{row['kept']} tokens in {row['held']} bytes, where {most} may be held"
    if bounds.kept is None and row["held"] != seen * token_bytes:
        yield f"{row['held']} bytes are held, and those of {seen} tokens should be"
    room = max(most * bounds.spare, FIRST_CAPACITY)
    if row["reserved"] > room * token_bytes:
        yield f"{row['reserved']} bytes are reserved, more than for {room:.0f} tokens"
    host = bounds.host * (seen + host_pool.FIRST_ROWS)
    if row["host"] > host * token_bytes:
        yield f"{row['host']} bytes of host memory, more than for {host:.0f} tokens"
    known = row["reserved"] + row["notes"] + row["host"]
    if row["tensors"] > known + OTHER + row["reserved"] // 64:
        yield f"{row['tensors'] - known} bytes of tensors are neither K and V nor notes"


def _growth(bounds: Bounds, rows: list[dict]) -> Iterator[str]:
    early, late = rows[len(rows) // 4 : len(rows) // 2], rows[len(rows) // 2 :]
    if bounds.kept is not None and not bounds.host:
        more = max(r["tensors"] for r in late) - max(r["tensors"] for r in early)
        if more > 0:
            yield f"tensors have grown by {more} bytes"
    objects = OBJECTS + HOST_OBJECTS * bool(bounds.host)
    for name, most in (("objects", objects), ("blocks", BLOCKS)):
        more = max(r[name] for r in late) - max(r[name] for r in early)
        if more > most:
            yield f"Python has {more} {name} more than earlier"
