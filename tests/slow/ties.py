"""Decoding where nearly everything ties: three kinds of keys, three queries that take turns.

Tokens of one kind with one history are worth the same, wherever they lie. The choice among them is
by age then, the same one on every machine and in every layout of memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from kvcomp import (
    METHODS,
    RKV,
    TOVA,
    LagKV,
    LazyEviction,
    Method,
    RaaS,
    RecencyWindow,
    SnapKV,
)
from kvcomp.cache import KVCache, StaticKVCache, StaticMeter
from kvcomp.methods.eviction import Eviction
from slow.eviction import (
    DIM,
    HEADS,
    KV_HEADS,
    SPARE,
    Slow,
    SlowLagKV,
    SlowLazy,
    SlowRaaS,
    SlowRecency,
    SlowRKV,
    SlowSnapKV,
    SlowTOVA,
    Trace,
    new_cache,
)

LENGTHS = range(1, 201)  # of a prompt
KINDS = 3
EVICTING: dict[str, tuple[type[Method], dict, type[Slow]]] = {
    "lazy-paper": (LazyEviction, {"window": 4, "alpha": 0.004}, SlowLazy),
    "lazy-code": (LazyEviction, {"window": 4, "alpha": 0.004, "h1": "code"}, SlowLazy),
    "raas": (RaaS, {"window": 4, "alpha": 0.004, "keep_prompt": False}, SlowRaaS),
    "tova": (TOVA, {"window": 4}, SlowTOVA),
    "snapkv": (SnapKV, {"window": 4, "recent": 2, "kernel": 1}, SlowSnapKV),
    "r-kv": (RKV, {"window": 4, "recent": 2, "kernel": 1}, SlowRKV),
    "lagkv": (LagKV, {"window": 4, "partition": 3, "sinks": 1}, SlowLagKV),
    "recency": (RecencyWindow, {"window": 4}, SlowRecency),
}


class Tied(Trace):
    """One row whose tokens are of a few kinds; the queries ask for one kind after the other."""

    def __init__(self, length: int, steps: int) -> None:
        self.lens, self.steps, self.layers = (length,), steps, 1
        generator = torch.Generator().manual_seed(length)
        total = length + steps + SPARE
        # Whole numbers, as normal ones are drawn by vectorised functions too.
        kinds = torch.randint(-3, 4, (1, 1, KV_HEADS, KINDS, DIM), generator=generator) / 2
        kind = torch.randint(KINDS, (total,), generator=generator)
        asked = kinds.repeat_interleave(HEADS // KV_HEADS, 2)
        self.k = self.raw_k = kinds[:, :, :, kind]
        self.q = self.raw_q = asked[:, :, :, torch.arange(total) % KINDS]
        self.v = self.k.flip(-1) + 1


def evicting(name: str, length: int) -> tuple[Method, Tied]:
    """A method that has to evict, and what it is to decode."""
    cls, fields, _ = EVICTING[name]
    budget = max(8, length // 2)
    return cls(budget=budget, **fields), Tied(length, steps=max(9, budget + 9 - length))


def rounded(slow: type[Slow]) -> type[Slow]:
    """A slow reading that takes scores for equal if they differ by rounding alone."""

    class Rounded(slow):
        def score(self):
            score = super().score().double()
            unit = 10.0 ** (score.abs().clamp(min=1e-30).log10().floor() - 7)
            return torch.where(score.isfinite(), (score / unit).round() * unit, score)

    return Rounded


def kept(cache: KVCache) -> list:
    """Per layer, row and unit, the positions of the tokens that are kept, sorted."""
    positions = []
    for layer in cache.layers:
        table = layer.positions(layer.slots["position"].shape[1])
        for row, count in enumerate(layer.seq_lens.tolist()):
            positions.append(table[row, :, :count].sort(-1).values.tolist())
    return positions


def kept_by_a_static_cache(method: Method, trace: Tied) -> list:
    """As `kept`, at the end of a trace over a cache of one size."""
    room = trace.lens[0] + trace.steps
    cache = StaticKVCache(method, trace.layers, StaticMeter(trace.layers), room)
    cache.enter(trace.lens[0])
    trace.fill(cache)
    for step in range(trace.steps):
        with cache.step():
            trace.decode(cache, step)
    return kept(cache)


def retrieving(length: int) -> Iterator[Method]:
    """Methods that must choose among pages that tie."""
    budget = {"budget": max(8, length // 3), "sinks": 1, "local": 4, "dense_layers": 0}
    for name in ("quest", "arkvale", "free-kv"):
        yield METHODS[name](**budget, page_size=2)


def digest() -> str:
    """Of the tokens that every method keeps at every length."""
    summary = hashlib.sha256()
    for length in LENGTHS:
        runs = [evicting(name, length) for name in EVICTING]
        runs += [(method, Tied(length, steps=5)) for method in retrieving(length)]
        for method, trace in runs:
            cache = new_cache(method)
            trace.run(cache)
            if isinstance(method, Eviction) or cache.layers[0].is_hosted:
                summary.update(f"{method.name} {length} {kept(cache)}\n".encode())
    return summary.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(torch.backends.cpu.get_cpu_capability(), digest())
