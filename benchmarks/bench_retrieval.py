"""What retrieval from host memory costs: in a layer's decode time, in the prompt's, and in bytes.

    python benchmarks/bench_retrieval.py --part share --json retrieval-share.json
    python benchmarks/bench_retrieval.py --part prefill --tokens 8192 --layers 4
    python benchmarks/bench_retrieval.py --smoke                  # a few seconds, for CI

share    How the decode time of a layer divides between attention and all that retrieval adds, and
         what each method's bytes over the link buy: recall, and the error against dense attention.
         Methods take their steps in turn, on caches that another layer's work has emptied.
prefill  What clustering and offloading add to a prompt, until all layers have settled: a random
         Qwen3 of the 0.6B shape with few layers, all of which retrieve.
memory   What stays on the device of a whole Qwen3-0.6B shape, as a share of dense K and V: by the
         cache's own counters, and by the tensors that are alive in the process.

The trace of `share` is made by hand. A key is one of many topic directions plus noise, in short
runs; a query points between two topics for about ten steps, until one of them is replaced. So the
set of tokens that matter holds still and then turns, as the LouisKV paper observes it in models:
here it is assumed, and what is measured is what the methods make of it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

import kvcomp
from bench_memory import Memory
from kvcomp import Method, ops
from kvcomp.cache import KVCache, LayerCache
from kvcomp.methods.audit import recall
from kvcomp.methods.retrieval import Retrieval
from kvcomp.testing.bench import OtherLoad, header, last_level_cache, meta, write_json
from ops.common import DTYPES, heads_of

PARTS = ("share", "prefill", "memory")
WARM_UP = 16  # steps that are not counted: the first selection brings everything
AUDIT_EVERY = 8  # steps between looks at the recall, which read all keys
QWEN3 = {  # 0.6B, but for layers and vocabulary
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- share: the trace -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A prompt and steps, batch 1."""

    keys: Tensor  # [1, Hkv, prompt + steps, D]
    values: Tensor
    queries: Tensor  # [steps, 1, Hq, D]
    prompt: int

    def rate(self, tau: float) -> float:
        """The share of the steps whose queries have turned below tau, by LouisKV's rule."""
        previous = torch.zeros_like(self.queries[0])
        seen = [ops.query_similarity(q, previous).item() for q in self.queries]
        return sum(similarity < tau for similarity in seen[1:]) / (len(seen) - 1)


def make_trace(options: argparse.Namespace, dtype: torch.dtype) -> Trace:
    """Two topics together have as many tokens as the budget, and nearly all of the attention."""
    heads, kv_heads, dim = options.shape
    prompt, steps = options.prompt, options.steps + WARM_UP
    topics = max(4, 2 * prompt // options.budget)
    generator = torch.Generator().manual_seed(options.seed)
    choice = random.Random(options.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions, meanings = normal(kv_heads, topics, dim), normal(kv_heads, topics, dim)
    directions *= dim**0.5 / directions.norm(dim=-1, keepdim=True)
    run = (torch.rand(prompt, generator=generator) < 1 / 8).cumsum(0)  # of eight tokens on average
    topic = torch.randint(topics, (prompt + 1,), generator=generator)[run].tolist()
    pair, left, queries = choice.sample(range(topics), 2), 0, []
    for _ in range(steps):
        if left == 0:
            pair = [pair[1], choice.choice([t for t in range(topics) if t not in pair])]
            left = choice.randint(7, 13)
        left -= 1
        between = directions[:, pair].sum(1).repeat_interleave(heads // kv_heads, 0) / 2**0.5
        queries.append(between + normal(heads, dim) / 3)  # cosines of 0.9, and 0.45 at a turn
        topic.append(choice.choice(pair))
    chosen = torch.tensor(topic)
    keys = directions[:, chosen] + normal(kv_heads, prompt + steps, dim)
    values = meanings[:, chosen] + normal(kv_heads, prompt + steps, dim)
    parts = (keys[None], values[None], torch.stack(queries)[:, None])
    return Trace(*(x.to(options.device, dtype) for x in parts), prompt)


# --- share: the methods ---------------------------------------------------------------------------


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
        index = self.layer.index
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
            int(scoring.layer.index.num_indexed[0]),
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


# --- prefill --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefillRow:
    """Seconds: until the logits are there, and until the layers have settled as well."""

    part: str
    method: str
    dtype: str
    tokens: int
    layers: int
    forward_s: float
    ready_s: float
    ready_s_min: float
    overhead: float | None = None  # of ready_s over Full's
    overhead_min: float | None = None

    def line(self) -> str:
        more = (
            ""
            if self.overhead is None
            else f"  {self.overhead:+.1%} (min {self.overhead_min:+.1%})"
        )
        return (
            f"{self.dtype}  {self.method:24} {self.tokens} tokens, {self.layers} layers"
            f"  forward {self.forward_s:6.2f} s  settled {self.ready_s:6.2f} s{more}"
        )


def bench_prefill(options: argparse.Namespace) -> Iterator[PrefillRow]:
    from transformers import AutoConfig, AutoModelForCausalLM

    methods = {"full": kvcomp.Full()} | {
        f"louis-kv, {n} iterations": kvcomp.LouisKV(dense_layers=0, iterations=n)
        for n in options.iterations
    }
    shape = QWEN3 | {"num_hidden_layers": options.layers, "tie_word_embeddings": True}
    if options.smoke:
        shape |= {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen3", **shape)
    tokens = torch.randint(shape["vocab_size"], (1, options.tokens), device=options.device)
    for name in options.dtype:
        torch.manual_seed(options.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[name]).eval()
        model.to(options.device)
        samples: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        order = random.Random(options.seed)
        for turn in range(options.repeats + 1):
            for method in order.sample(list(methods), len(methods)):
                if turn or method == "full":  # once, to warm up
                    samples[method].append(_prefill(model, methods[method], tokens))
        samples["full"].pop(0)
        full = samples["full"]
        for method, taken in samples.items():
            forward, ready = (statistics.median(x) for x in zip(*taken, strict=True))
            least = min(x for _, x in taken)
            row = PrefillRow(
                "prefill", method, name, options.tokens, options.layers, forward, ready, least
            )
            if method != "full":
                row = replace(
                    row,
                    overhead=ready / statistics.median(x for _, x in full) - 1,
                    overhead_min=least / min(x for _, x in full) - 1,
                )
            yield row


@torch.inference_mode()
def _prefill(model: torch.nn.Module, method: Method, tokens: Tensor) -> tuple[float, float]:
    with kvcomp.patch(model, method) as run:
        cache, device = run.new_cache(), tokens.device.type
        start = now(device)
        model(tokens, past_key_values=cache, logits_to_keep=1)
        forward = now(device)
        for layer in cache.kv.layers:
            layer.settle()
        return forward - start, now(device) - start


# --- memory ---------------------------------------------------------------------------------------


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
    index = sum(layer.index.nbytes for layer in cache.layers if layer.index is not None)
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


# --- command line ---------------------------------------------------------------------------------

BENCHMARKS = {"share": bench_share, "prefill": bench_prefill, "memory": bench_memory}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--prompt", type=int, default=32768, metavar="N", help="of share and memory")
    add("--steps", type=int, default=200, metavar="N", help="of share and memory, that count")
    add("--shape", type=heads_of, default=(32, 8, 128), metavar="Hq/HkvxD", help="of share")
    add("--budget", type=int, default=1024, metavar="B", help="of share")
    add("--tau", type=float, default=0.7, help="of share")
    add("--tokens", type=int, default=8192, metavar="N", help="of a prompt of prefill")
    add("--layers", type=int, default=4, help="of prefill's model; all cost alike")
    add("--memory-layers", type=int, default=28, help="of memory's; two of them keep all")
    add("--iterations", type=int, nargs="+", default=[3, 5, 10], help="of prefill's clustering")
    add("--repeats", type=int, default=5, help="of prefill")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="default: what torch uses")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE")
    add("--smoke", action="store_true", help="tiny inputs, a few seconds: does it run?")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.smoke:
        options.prompt, options.steps, options.shape, options.budget = 1024, 24, (4, 2, 64), 128
        options.tokens, options.layers, options.memory_layers = 512, 2, 3
        options.iterations, options.repeats, options.dtype = [3], 1, options.dtype[:1]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    load = OtherLoad()
    facts = meta(
        "retrieval",
        options.device,
        **{n: getattr(options, n) for n in ("part", "prompt", "steps", "shape", "budget", "tau")},
    )
    print(header(facts), flush=True)
    if options.smoke:
        print("smoke test: the inputs are too small for these figures to mean anything")
    rows = []
    for part in options.part:
        print(f"\n{part}", flush=True)
        for row in BENCHMARKS[part](options):
            print(row.line(), flush=True)
            rows.append(asdict(row))
    facts["others_cpu_share"] = load.share()
    if facts["others_cpu_share"] is not None:
        print(f"\nother processes took {facts['others_cpu_share']:.0%} of the CPU meanwhile")
    if options.json:
        write_json(options.json, facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
