"""One decode step: how long it takes, beside stock transformers and beside what its bytes allow."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decode.contenders import (
    STATIC,
    STOCK,
    Contender,
    Filling,
    boundary_seconds,
    contender,
    context_of,
    method_for,
)
from decode.models import make_model, token_bytes, weight_bytes
from harness.kv import parted
from harness.memory import free_memory
from kvcomp import Delethink
from kvcomp.probe import Probe, bandwidth_probe
from ops.common import DTYPES
from retrieval.common import now
from retrieval.share import Times

TURN = 8  # steps with the same token; then queries turn, and LouisKV retrieves
WARM_UP = 2
STOCK_SPLITS = 3  # steps of stock that are looked into, which are long
PROBE = "probe"
PARTS = ("attention", "update", "linear", "norm")


@dataclass(frozen=True)
class StepRow:
    """Times in ms. Of `probe` and `stock`: in the rounds of this contender."""

    part: str
    shape: str
    dtype: str
    batch: int
    tokens: int
    name: str
    ms: float  # median; with several kinds of steps, their mean by how often they come
    ms_min: float
    rounds: int
    stock_ms: float
    stock_ms_min: float
    speedup: float
    speedup_min: float  # by minima
    kv_bytes: int  # that attention reads in a step, all rows
    weight_bytes: int
    probe_gbps: float
    probe_gbps_max: float
    ceiling_ms: float  # weights and KV over the median of the probe
    ceiling_share: float  # of a step, by medians
    attention_ms: float  # of a step that is looked into, not of those timed
    update_ms: float
    linear_ms: float
    norm_ms: float
    rest_ms: float
    parameters: str
    retrieval_rate: float  # of steps
    boundary_ms: float | None = None  # per token, of encoding a carry

    def line(self) -> str:
        parts = {name: getattr(self, f"{name}_ms") for name in (*PARTS, "rest")}
        whole = sum(parts.values())  # 0 for a compiled step
        shares = "  ".join(f"{name} {ms / whole:4.0%}" for name, ms in parts.items() if whole)
        text = (
            f"{self.shape} {self.dtype} B={self.batch} n={self.tokens:<6} {self.name:14}"
            f" {self.ms:8.1f} ms (min {self.ms_min:7.1f})  stock {self.speedup:5.2f}x"
            f" (min {self.speedup_min:5.2f}x)  KV {self.kv_bytes / 1e6:7.1f} MB"
            f"  ceiling {self.ceiling_ms:6.1f} ms at {self.probe_gbps:4.1f} GB/s,"
            f" {self.ceiling_share:4.0%}  {shares}"
        )
        if self.boundary_ms is not None:
            text += f"  and {self.boundary_ms:.1f} ms per token for carries"
        return text


def bench_steps(options: argparse.Namespace) -> Iterator[StepRow]:
    """As many contenders at a time beside stock as memory has room for; stock's row is the last of
    a context. Those in `options.done` are left out."""
    model = make_model(options.shape, DTYPES[options.dtype], options.device, options.seed)
    probe = bandwidth_probe(options.device)
    for batch in options.batch:
        carry: list[float] = []  # seconds that one takes to be encoded, measured once
        for tokens in options.tokens:
            if (batch, tokens) in options.done:
                continue
            yield from _at(model, probe, batch, tokens, carry, options)


def _at(
    model: PreTrainedModel,
    probe: Probe,
    batch: int,
    tokens: int,
    carry: list[float],
    options: argparse.Namespace,
) -> Iterator[StepRow]:
    groups = _groups(options.method, batch * tokens * token_bytes(model), options.device)
    if not groups:
        print(f"{options.shape} B={batch} n={tokens}: does not fit this memory beside stock")
        return
    filling = Filling.make(model, batch, tokens, options.seed)
    room = WARM_UP + options.rounds + 2 * TURN
    stock = contender(STOCK, model, filling, room, options)
    parts = split(stock, filling, STOCK_SPLITS)
    all_times = {STOCK: Times(), PROBE: Times()}
    for names in groups:
        stock.cache.crop(tokens - int(stock.cache.get_seq_length()))
        players = [contender(name, model, filling, room, options) for name in names]
        times, counted = race([stock, *players], probe, filling, options)
        for player in players:
            shares = split(player, filling, TURN)
            row = _row(player, times, counted[player.name], shares, model, probe, options)
            player.close()
            if parted(player.name)[0] == Delethink.name:
                seconds = _boundary(model, filling, carry, options)
                row = replace(row, boundary_ms=seconds and seconds * 1e3)
            yield replace(row, tokens=tokens)
        for name, whole in all_times.items():
            whole.kinds += times[name].kinds
            whole.seconds += times[name].seconds
    yield _row(stock, all_times, 0, parts, model, probe, options)


def _groups(names: list[str], dense_bytes: int, device: str) -> list[list[str]]:
    """Who is measured together; nobody who does not fit beside stock alone.

    Args:
        dense_bytes: of K and V.
    """
    free = 0.85 * free_memory(device) - 1.1 * dense_bytes
    groups, left = [], 0.0
    for name in names:
        need = (1.0 if name == STATIC else 1.5) * dense_bytes  # our slabs grow by half
        if need > free:
            continue
        if need > left:
            groups.append([])
            left = free
        groups[-1].append(name)
        left -= need
    return groups


def _boundary(
    model: PreTrainedModel, filling: Filling, carry: list[float], options: argparse.Namespace
) -> float | None:
    """Seconds per token that encoding carries takes; None: in the first chunk there is none."""
    tokens = filling.keys.shape[2]
    method = method_for(Delethink.name, tokens, options.smoke)
    if context_of(method, tokens, options.prompt) == tokens:
        return None
    if not carry:
        carry.append(boundary_seconds(model, filling, method, options.prompt))
    return carry[0] / (method.chunk - method.carry)


def race(
    players: list[Contender], probe: Probe, filling: Filling, options: argparse.Namespace
) -> tuple[dict[str, Times], dict[str, int]]:
    """All take their steps in turn, and the probe too, in an order that changes.

    Returns:
        times by name, and bytes of K and V that each counted per step.
    """
    device, order = options.device, random.Random(options.seed)
    times = {name: Times() for name in (PROBE, *(p.name for p in players))}
    counted = {p.name: 0 for p in players}
    began, turn = time.perf_counter(), -WARM_UP
    while turn < options.rounds:
        if turn > 0 and turn % TURN == 0 and time.perf_counter() - began > options.seconds:
            break
        token = filling.ids[:, turn // TURN, None]
        for player in order.sample([None, *players], 1 + len(players)):
            before = (0, 0) if player is None else player.counts()
            start = now(device)
            if player is None:
                probe.run()
            else:
                player.step(token)
            seconds = now(device) - start
            if turn < 0:
                continue
            after = (0, 0) if player is None else player.counts()
            own = times[PROBE if player is None else player.name]
            own.kinds.append((after[0] > before[0],))
            own.seconds.append(seconds)
            if player is not None:
                counted[player.name] += after[1] - before[1]
        turn += 1
    return times, {name: count // turn for name, count in counted.items()}


def _row(
    player: Contender,
    times: dict[str, Times],
    counted: int,
    parts: dict[str, float],
    model: PreTrainedModel,
    probe: Probe,
    options: argparse.Namespace,
) -> StepRow:
    own, stock = times[player.name], times[STOCK]
    ms, ms_min = own.mean() * 1e3, own.mean(min) * 1e3
    stock_ms, stock_ms_min = stock.mean() * 1e3, stock.mean(min) * 1e3
    rate = probe.bytes / statistics.median(times[PROBE].seconds)
    kv, weights = player.kv_bytes(counted), weight_bytes(model)
    ceiling_ms = (kv + weights) / rate * 1e3
    return StepRow(
        part="step",
        shape=options.shape,
        dtype=options.dtype,
        batch=len(player.filling.ids),
        tokens=player.filling.keys.shape[2],
        name=player.name,
        ms=ms,
        ms_min=ms_min,
        rounds=len(own.seconds),
        stock_ms=stock_ms,
        stock_ms_min=stock_ms_min,
        speedup=stock_ms / ms,
        speedup_min=stock_ms_min / ms_min,
        kv_bytes=kv,
        weight_bytes=weights,
        probe_gbps=rate / 1e9,
        probe_gbps_max=probe.bytes / min(times[PROBE].seconds) / 1e9,
        ceiling_ms=ceiling_ms,
        ceiling_share=ceiling_ms / ms,
        **parts,
        parameters=player.parameters,
        retrieval_rate=sum(kind[0] for kind in own.kinds) / len(own.kinds),
    )


def split(player: Contender, filling: Filling, steps: int) -> dict[str, float]:
    """ms per step of each part, over steps of which the first has a new token; 0 where they cannot
    be told apart."""
    token = filling.ids[:, -1:]
    if not player.divisible:
        return {f"{name}_ms": 0.0 for name in (*PARTS, "rest")}
    with watched(player) as seconds:
        start = now(player.device)
        for _ in range(steps):
            player.step(token)
        whole = now(player.device) - start
    parts = {f"{name}_ms": seconds[name] * 1e3 / steps for name in PARTS}
    return parts | {"rest_ms": whole * 1e3 / steps - sum(parts.values())}


@contextmanager
def watched(player: Contender) -> Iterator[dict[str, float]]:
    """Seconds spent in attention (with all that a method does there), cache update, linear layers,
    LM head included, and norms, while the block runs."""
    model, layers, device = player.model, player.layers, player.device
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            start = now(device)
            out = function(*args, **kwargs)
            seconds[part] += now(device) - start
            return out

        return run

    name = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    AttentionInterface.register(name, timed("attention", attention))
    layers.update = timed("update", layers.update)
    before = {module: module.__dict__.get("forward") for module in (*linear, *norms)}
    for part, modules in (("linear", linear), ("norm", norms)):
        for module in modules:
            module.forward = timed(part, module.forward)
    try:
        yield seconds
    finally:
        AttentionInterface.register(name, attention)
        del layers.update
        for module, forward in before.items():  # a patch may have put one there
            del module.forward
            if forward is not None:
                module.forward = forward
