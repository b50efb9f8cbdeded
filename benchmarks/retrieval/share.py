"""How a layer's decode time divides, and what the bytes over the link buy."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kvcomp
from harness.timing import last_level_cache
from kvcomp import Method, ops
from kvcomp.cache import KVCache, LayerCache
from kvcomp.methods.audit import recall
from kvcomp.methods.retrieval import Retrieval
from ops.common import DTYPES
from retrieval.common import now
from retrieval.trace import WARM_UP, Trace, make_trace

AUDIT_EVERY = 8  # steps between looks at the recall, which read all keys


def contestants(options: argparse.Namespace, rate: float) -> dict[str, Method]:
    """All with the same bound on what is resident, all layers retrieving."""
    common = {"budget": options.budget, "dense_layers": 0}
    if options.budget < 16 + 256:  # of a smoke test
        common |= {"sinks": 4, "local": 32}
    return {
        "full": kvcomp.Full(),
        "louis-kv": kvcomp.LouisKV(tau=options.tau, **common),
        "stride-retrieval": kvcomp.StrideRetrieval(stride=max(1, round(1 / rate)), **common),
        "per-token-retrieval": kvcomp.PerTokenRetrieval(tau=options.tau, **common),
        "quest": kvcomp.Quest(**common),
        "arkvale": kvcomp.ArkVale(**common),
    }


@dataclass
class Times:
    """Seconds of one kind of work, step by step."""

    kinds: list[tuple] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def mean(self, pick: Callable[[list[float]], float] = statistics.median) -> float:
        """A mean over the kinds of steps of the median, or another `pick`, within each.

        A mean over all steps would be at the mercy of every interruption; a median over all of them
        would not see what happens at one step in ten.
        """
        groups: dict[tuple, list[float]] = {}
        for kind, taken in zip(self.kinds, self.seconds, strict=True):
            groups.setdefault(kind, []).append(taken)
        return sum(len(g) * pick(g) for g in groups.values()) / len(self.seconds)

    def only(self, retrieving: bool) -> float | None:
        """The median of steps that retrieve, or of those that do not."""
        pairs = zip(self.kinds, self.seconds, strict=True)
        chosen = [taken for kind, taken in pairs if kind[0] == retrieving]
        return statistics.median(chosen) if chosen else None


class Contestant:
    """One layer of one method, and what was measured on it."""

    def __init__(self, method: Method, trace: Trace, device: str) -> None:
        self.method, self.device = method, device
        self.scale = trace.queries.shape[-1] ** -0.5
        self.cache = KVCache(method, 2)
        # The first of two: what is done once a step, behind the last layer, is no layer's.
        self.layer: LayerCache = self.cache.layers[0]
        self.append, self.step, self.attention = Times(), Times(), Times()
        self.errors: list[float] = []
        self.recalls: list[float] = []
        k, v = (x[:, :, : trace.prompt] for x in (trace.keys, trace.values))
        self.layer.append(k, v)
        # A prefill looks at no query but for its shape.
        self.cache.prefill(self.layer, trace.queries[0][:, :, None], self.scale)
        self.layer.settle()
        self.spare = LayerCache(self.cache, 1)  # appended to before attention alone is timed
        self.before = self.counts()

    def counts(self) -> Tensor:
        """Retrievals, rows wanted, fetched and stored."""
        meter = self.cache.meter
        counters = (meter.retrievals, meter.wanted_rows, meter.fetched_rows, meter.stored_rows)
        return torch.tensor([int(counter[0]) for counter in counters])

    def take(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A whole step, timed."""
        before = self.counts()
        start = now(self.device)
        self.layer.append(k, v)
        appended = now(self.device)
        out = self.cache.attend(self.layer, q, self.scale)
        end = now(self.device)
        retrievals, _, _, stored = (self.counts() - before).tolist()
        self.append.seconds.append(appended - start)
        self.step.seconds.append(end - appended)
        for times in (self.append, self.step, self.attention):
            times.kinds.append((retrievals > 0, stored > 0))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """The attention of that step once more, alone; behind an append, as in a step."""
        self.spare.append(k, v)
        start = now(self.device)
        self.layer.attend(q, self.scale)
        self.attention.seconds.append(now(self.device) - start)

    def judge(self, q: Tensor, out: Tensor, dense: Tensor, audit: bool) -> None:
        self.errors.append(((out - dense).norm() / dense.norm()).item())
        if audit and isinstance(self.method, Retrieval):
            budget, sinks = self.method.budget, self.method.sinks
            self.recalls.append(recall(self.layer, q, self.scale, budget, sinks).item())

    def forget(self) -> None:
        """The steps so far were to warm up."""
        self.append, self.step, self.attention = Times(), Times(), Times()
        self.errors, self.recalls = [], []
        self.before = self.counts()


class Scoring:
    """Scoring and selection alone, on a layer that retrieves."""

    def __init__(self, layer: LayerCache, budget: int, device: str) -> None:
        self.layer, self.budget, self.device = layer, budget, device
        self.active = torch.ones_like(layer.seq_lens)
        self.times = Times()
        self.spare = LayerCache(layer.cache, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.spare.append(k, v)
        index = self.layer.hosted.index
        start = now(self.device)
        scores = ops.unit_scores(q, index.digests, index.starts, index.num_indexed, self.active)
        ops.select_units(scores, index.starts, index.num_indexed, self.active, self.budget)
        self.times.seconds.append(now(self.device) - start)
        self.times.kinds.append(())


@dataclass(frozen=True)
class ShareRow:
    """Times in microseconds, of one step of one layer: medians, and minima beside them."""

    part: str
    method: str
    dtype: str
    append_us: float
    step_us: float  # without the append
    step_us_min: float
    attention_us: float
    attention_us_min: float
    retrieval_share: float  # of step_us
    retrieval_share_min: float  # by minima
    retrieving_us: float | None  # a step that retrieves
    quiet_us: float | None  # one that does not
    rate: float
    missing: float  # of a selection, what came over the link
    link_bytes: float  # per token, both ways
    recall: float | None
    error: float
    parameters: str

    def line(self) -> str:
        kinds = [
            f"{name} {us:6.0f} us"
            for name, us in (("quiet", self.quiet_us), ("retrieving", self.retrieving_us))
            if us is not None
        ]
        return (
            f"{self.dtype}  {self.method:20} step {self.step_us:7.0f} us"
            f"  attention {self.attention_us:7.0f} us  retrieval {self.retrieval_share:6.1%}"
            f" (min {self.retrieval_share_min:6.1%})  rate {self.rate:6.1%}"
            f"  missing {self.missing:6.1%}  link {self.link_bytes / 1024:7.1f} KiB"
            f"  recall {'   -  ' if self.recall is None else f'{self.recall:6.1%}'}"
            f"  error {self.error:6.2%}  append {self.append_us:4.0f} us  {'  '.join(kinds)}"
        )


@dataclass(frozen=True)
class ScoringRow:
    part: str
    method: str
    dtype: str
    units: int
    us: float
    us_min: float
    dense_share: float  # of Full's attention in the same rounds
    dense_share_min: float

    def line(self) -> str:
        return (
            f"{self.dtype}  {self.method} of {self.units} units: {self.us:.0f} us,"
            f" {self.dense_share:.1%} (min {self.dense_share_min:.1%}) of the dense attention"
        )


def bench_share(options: argparse.Namespace) -> Iterator[ShareRow | ScoringRow]:
    for name in options.dtype:
        trace = make_trace(options, DTYPES[name])
        methods = contestants(options, max(trace.rate(options.tau), 0.01))
        players = {m: Contestant(x, trace, options.device) for m, x in methods.items()}
        scoring = Scoring(players["louis-kv"].layer, options.budget, options.device)
        _race(trace, players, scoring, options)
        rows = {m: _share_row(m, name, player) for m, player in players.items()}
        yield from rows.values()
        dense, (median, least) = rows["full"], (scoring.times.mean(), scoring.times.mean(min))
        yield ScoringRow(
            "share",
            "unit_scores + select_units",
            name,
            int(scoring.layer.hosted.index.num_indexed[0]),
            median * 1e6,
            least * 1e6,
            median * 1e6 / dense.attention_us,
            least * 1e6 / dense.attention_us_min,
        )


def _race(
    trace: Trace, players: dict[str, Contestant], scoring: Scoring, options: argparse.Namespace
) -> None:
    """All steps of all methods, in turn, in an order that changes."""
    others = torch.ones(2 * last_level_cache(options.device) // 4, device=options.device)
    order = random.Random(options.seed)

    def shuffled(things: Sequence) -> list:
        return order.sample(list(things), len(things))

    for step, q in enumerate(trace.queries):
        if step == WARM_UP:
            for player in players.values():
                player.forget()
            scoring.times = Times()
        k, v = (x[:, :, trace.prompt + step, None] for x in (trace.keys, trace.values))
        outs = {}
        for name in shuffled(players):
            others.sum()  # as other layers and the weights would empty the caches
            outs[name] = players[name].take(q, k, v)
        for player in shuffled([*players.values(), scoring]):
            others.sum()
            player.attend(q, k, v)
        dense = outs["full"].float()
        for name, player in players.items():
            player.judge(q, outs[name].float(), dense, step % AUDIT_EVERY == 0)


def _share_row(name: str, dtype: str, player: Contestant) -> ShareRow:
    steps = len(player.step.seconds)
    retrievals, wanted, fetched, stored = (player.counts() - player.before).tolist()
    row_bytes = player.layer.token_bytes // player.layer.keys.shape[1]
    step, attention = player.step.mean(), player.attention.mean()
    step_min, attention_min = player.step.mean(min), player.attention.mean(min)
    quiet, retrieving = (
        None if seconds is None else seconds * 1e6
        for seconds in (player.step.only(False), player.step.only(True))
    )
    return ShareRow(
        part="share",
        method=name,
        dtype=dtype,
        append_us=player.append.mean() * 1e6,
        step_us=step * 1e6,
        step_us_min=step_min * 1e6,
        attention_us=attention * 1e6,
        attention_us_min=attention_min * 1e6,
        retrieval_share=1 - attention / step,
        retrieval_share_min=1 - attention_min / step_min,
        retrieving_us=retrieving,
        quiet_us=quiet,
        rate=retrievals / steps,
        missing=fetched / max(wanted, 1),
        link_bytes=(fetched + stored) * row_bytes / steps,
        recall=statistics.mean(player.recalls) if player.recalls else None,
        error=statistics.mean(player.errors),
        parameters=str(player.method),
    )
