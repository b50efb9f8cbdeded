"""A decode step as one CUDA graph: what a method gives where nothing but the GPU counts.

Full, Delta and LazyEviction on caches of one size, and transformers' StaticCache. What the host
does for LazyEviction between the steps of a window is timed apart, launch by launch, and every step
has its share of it. On a CPU, where there are no graphs, the same steps are timed as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, StaticCache

from decode.contenders import STATIC, Contender, Filling, OneSize, method_for
from decode.models import make_model, token_bytes, weight_bytes
from harness.memory import free_memory
from harness.timing import interleave
from kvcomp import LazyEviction
from kvcomp.probe import bandwidth_probe
from ops.common import DTYPES

DENSE = "full"
EVICTING = "lazy-eviction"
NAMES = (DENSE, "delta", EVICTING, STATIC)
BETWEEN = "between steps"
MEAN = "mean"  # over all contexts, as many tokens at each


class Evicting(OneSize):
    """LazyEviction in the middle of a window, with no memory for what left long ago."""

    def __init__(
        self, method: LazyEviction, model: PreTrainedModel, filling: Filling, room: int
    ) -> None:
        self.window, self.budget = method.window, method.budget
        super().__init__(method, model, filling.first(method.budget + method.window), room)
        self._stand(self.window // 2)

    @torch.no_grad()
    def end_window(self) -> None:
        """What the host does beside the steps of a window: replays of hits, then an eviction."""
        self._stand(self.window)
        kv = self.cache.kv
        kv.steps = kv.state.replayed = 0
        for layer in kv.layers:
            layer.columns += self.window
        for _ in range(self.window):
            kv.leave()
        self._stand(self.window // 2)
        kv.meter.settle()  # waits, so that launches are a part of the time

    @torch.no_grad()
    def _stand(self, steps: int) -> None:
        """As many steps after an eviction."""
        kv = self.cache.kv
        kv.steps = kv.state.replayed = steps
        for layer in kv.layers:
            layer.seq_lens.fill_(self.budget + steps)
            layer.logical_lens.add_(steps)


@dataclass(frozen=True)
class GraphRow:
    """Times in ms, of a step of all rows."""

    part: str
    shape: str
    dtype: str
    batch: int
    tokens: int | str  # seen before it; `MEAN` over them
    name: str
    ms: float
    ms_min: float
    between_ms: float  # of both, what happens between steps
    spread: float  # of two identical runs
    in_graph: bool
    speedup: float  # over our own dense attention, by medians
    kv_bytes: int  # that attention reads
    weight_bytes: int
    probe_gbps: float  # of the same rounds
    ceiling_ms: float
    ceiling_share: float
    parameters: str

    def line(self) -> str:
        return (
            f"{self.shape} {self.dtype} B={self.batch} n={self.tokens!s:<6} {self.name:10}"
            f" {self.ms:8.3f} ms (min {self.ms_min:8.3f}, spread {self.spread:4.1%})"
            f"  {DENSE} {self.speedup:5.2f}x  KV {self.kv_bytes / 1e6:8.1f} MB"
            f"  ceiling {self.ceiling_ms:7.3f} ms at {self.probe_gbps:6.1f} GB/s,"
            f" {self.ceiling_share:4.0%}{'' if self.in_graph else '  no graph'}"
        )


def bench_graphs(options: argparse.Namespace) -> Iterator[GraphRow]:
    model = make_model(options.shape, DTYPES[options.dtype], options.device, options.seed)
    for batch in options.batch:
        rows: list[GraphRow] = []
        for tokens in options.tokens:
            room = tokens + 4 * options.rounds + 64
            # All but one hold everything; that one half, which is more than filling it takes.
            need = ((len(NAMES) - 1) * room + tokens) * batch * token_bytes(model)
            if need > 0.9 * free_memory(options.device):
                print(f"{options.shape} B={batch} n={tokens}: does not fit this memory")
                continue
            rows += _at(model, batch, tokens, room, options)
            yield from rows[-len(NAMES) :]
        if len(options.tokens) > 1 and len(rows) == len(NAMES) * len(options.tokens):
            yield from _means(rows)


def _at(
    model: PreTrainedModel, batch: int, tokens: int, room: int, options: argparse.Namespace
) -> list[GraphRow]:
    filling = Filling.make(model, batch, tokens, options.seed)
    probe = bandwidth_probe(options.device)
    players = []
    for name in NAMES:
        if name == STATIC:
            cache = StaticCache(config=model.config, max_cache_len=room)
            players.append(Contender(name, model, cache, filling))
            continue
        ours = Evicting if name == EVICTING else OneSize
        players.append(ours(method_for(name, tokens, options.smoke), model, filling, room))
    token = filling.ids[:, -1:]
    kv_bytes = {}
    for player in players:
        before = player.counts()[1]
        player.step(token)
        kv_bytes[player.name] = player.kv_bytes(player.counts()[1] - before)
    runs = {player.name: lambda player=player: player.step(token) for player in players}
    evicting = players[NAMES.index(EVICTING)]
    timings = interleave(
        runs | {"probe": probe.run, BETWEEN: evicting.end_window},
        options.rounds,
        device=options.device,
        calls_in_graph=dict.fromkeys(runs, 1),  # a step reads more than any cache holds
    )
    rate = probe.bytes / timings["probe"].median
    weights, dense = weight_bytes(model), timings[DENSE].median
    rows = []
    for player in players:
        own, kv = timings[player.name], kv_bytes[player.name]
        between = timings[BETWEEN].median / evicting.window if player is evicting else 0.0
        seconds = own.median + between
        ceiling = (kv + weights) / rate
        rows.append(
            GraphRow(
                part="graph",
                shape=options.shape,
                dtype=options.dtype,
                batch=batch,
                tokens=tokens,
                name=player.name,
                ms=seconds * 1e3,
                ms_min=(own.minimum + between) * 1e3,
                between_ms=between * 1e3,
                spread=own.spread,
                in_graph=own.in_graph,
                speedup=dense / seconds,
                kv_bytes=kv,
                weight_bytes=weights,
                probe_gbps=rate / 1e9,
                ceiling_ms=ceiling * 1e3,
                ceiling_share=ceiling / seconds,
                parameters=player.parameters,
            )
        )
        player.close()
    return rows


def _means(rows: list[GraphRow]) -> Iterator[GraphRow]:
    """What a generation sees that passes through all of these contexts."""
    dense = sum(row.ms for row in rows if row.name == DENSE)
    for name in NAMES:
        own = [row for row in rows if row.name == name]
        ms, ceiling = (
            sum(x) / len(own) for x in ([r.ms for r in own], [r.ceiling_ms for r in own])
        )
        yield GraphRow(
            part="graph",
            shape=own[0].shape,
            dtype=own[0].dtype,
            batch=own[0].batch,
            tokens=MEAN,
            name=name,
            ms=ms,
            ms_min=sum(row.ms_min for row in own) / len(own),
            between_ms=sum(row.between_ms for row in own) / len(own),
            spread=max(row.spread for row in own),
            in_graph=all(row.in_graph for row in own),
            speedup=dense / len(own) / ms,
            kv_bytes=sum(row.kv_bytes for row in own) // len(own),
            weight_bytes=own[0].weight_bytes,
            probe_gbps=sum(row.probe_gbps for row in own) / len(own),
            ceiling_ms=ceiling,
            ceiling_share=ceiling / ms,
            parameters=own[0].parameters,
        )
