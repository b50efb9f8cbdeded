"""Methods: parameters out of range, of another type, or that do not fit a model's depth."""

import dataclasses
import math

from bad_input import Attempt, Bad
from kvcomp import (
    H2O,
    METHODS,
    RKV,
    Delethink,
    Delta,
    LagKV,
    LazyEviction,
    LessIsMore,
    LMInfinite,
    LouisKV,
    RaaS,
    RandomEviction,
    RandomPages,
    SnapKV,
    StreamingLLM,
    TidalDecode,
)
from kvcomp.cache import KVCache
from kvcomp.methods.fields import WORDS

SHORT = {"chunk": 13, "carry": 6, "head": 2, "max_chunks": None}


def making(make):
    return lambda: Attempt(run=make, state=lambda: dict(METHODS))


ROWS = [
    Bad(making(lambda: Delta(budget=100)), "multiple of page_size"),
    Bad(making(lambda: Delta(budget=56, sinks=0)), "least recent \\* page_size"),
    Bad(making(lambda: Delta(page_size=0)), "page_size: expected at least 1 token, got 0"),
    Bad(making(lambda: KVCache(Delta(delta_layers=(2, 30)), 28)), "up to 27"),
    Bad(making(lambda: KVCache(Delta(warmup=2, delta_layers=(1, 14)), 28)), "from warmup=2"),
    Bad(making(lambda: KVCache(Delta(warmup=2, delta_layers=(5, 14)), 28)), "directly"),
    Bad(making(lambda: KVCache(Delta(delta_layers=(-1, 14)), 28)), "from 0 up to 27"),
    Bad(making(lambda: KVCache(Delta(delta_layers=()), 28)), "directly"),
    Bad(making(lambda: KVCache(Delta(warmup=2), 2)), "warmup=2 needs more layers"),
    Bad(making(lambda: RandomPages(budget=100)), "multiple of page_size"),
    Bad(making(lambda: RandomPages(budget=32)), "expected 1 to 4 pages"),
    Bad(making(lambda: KVCache(RandomPages(dense_layers=(9,)), 8)), "0..7"),
    Bad(
        making(lambda: LazyEviction(budget=64, window=64)),
        "budget: expected more than the 64 newest",
    ),
    Bad(
        making(lambda: LazyEviction(alpha=0.0)),
        "alpha: expected a probability between 0 and 1, got 0",
    ),
    Bad(making(lambda: LazyEviction(alpha=1.0)), "alpha: expected a probability"),
    Bad(making(lambda: LazyEviction(alpha=math.nan)), "alpha: expected a probability"),
    Bad(making(lambda: LazyEviction(budget=40, window=9, sinks=32)), "sinks: expected 0 to .*= 31"),
    Bad(making(lambda: LazyEviction(sinks=-1)), "sinks: expected 0 to"),
    Bad(making(lambda: Delta(sinks=-1)), "sinks: expected at least 0 pages, got -1"),
    Bad(making(lambda: Delta(budget=64)), r"at least .recent . sinks. . page_size = 72"),
    Bad(making(lambda: LazyEviction(window=0)), "window: expected at least 1 step, got 0"),
    Bad(making(lambda: LazyEviction(unit="head")), "unit: expected one of kv_head.*, got 'head'"),
    Bad(
        making(lambda: LazyEviction(h1="theirs")),
        "h1: expected one of patient.*, got 'theirs'",
    ),
    Bad(making(lambda: LazyEviction.published("gpt-2", "aime")), "nothing published for 'gpt-2'"),
    Bad(
        making(lambda: LazyEviction.for_model(None)),
        "kvcomp.LazyEviction: model: expected a name or a transformers model, got NoneType",
        TypeError,
    ),
    Bad(making(lambda: Delta.for_model(7)), "kvcomp.Delta: model: expected a name", TypeError),
    Bad(making(lambda: Delta(group="x")), "group: expected a torch.distributed", TypeError),
    Bad(
        making(lambda: LazyEviction.published("DeepSeek-R1-Distill-Qwen-7B", "chess")),
        "no window published for DeepSeek-R1-Distill-Qwen-7B on 'chess', only for gsm8k",
    ),
    Bad(making(lambda: LazyEviction.published("Qwen/QwQ-32B", "aime")), "only its alpha"),
    Bad(making(lambda: RaaS(alpha=2.0)), "alpha: expected a probability"),
    Bad(making(lambda: StreamingLLM(budget=4)), "sinks: expected 0 to budget - 1 = 3, got 4"),
    Bad(making(lambda: StreamingLLM(sinks=-1)), "sinks: expected 0 to"),
    Bad(making(lambda: StreamingLLM(keep_prompt=True)), "keep_prompt"),
    Bad(making(lambda: LMInfinite(budget=10)), "sinks: expected 0 to"),
    Bad(making(lambda: KVCache(StreamingLLM(), 2)), "moves keys to other positions"),
    Bad(making(lambda: RandomEviction(budget=32, recent=32)), "budget: expected more than the 32"),
    Bad(making(lambda: SnapKV(recent=0)), "recent: expected at least 1"),
    Bad(making(lambda: RKV(recent=0)), "recent: expected at least 1"),
    Bad(making(lambda: LagKV(budget=258)), "budget: expected at least sinks .* = 259, got 258"),
    Bad(making(lambda: LagKV(budget=255)), "budget: expected more than the 255 newest"),
    Bad(making(lambda: H2O(budget=0)), "budget: expected more than the 0 newest"),
    Bad(
        making(lambda: LouisKV(budget=100, sinks=16, local=256)),
        "budget: expected at least sinks \\+ local = 272 tokens, got 100",
    ),
    Bad(making(lambda: LouisKV(tau=-1.1)), "tau: expected a number from -1 to 2, got -1.1"),
    Bad(making(lambda: LouisKV(tau=2.1)), "tau: expected a number from -1 to 2, got 2.1"),
    Bad(making(lambda: LouisKV(tau=float("nan"))), "tau: expected a number from -1 to 2, got nan"),
    Bad(making(lambda: LouisKV(cluster_size=0)), "cluster_size: expected at least 1 token, got 0"),
    Bad(
        making(lambda: LouisKV(window=8)), "window: expected at least cluster_size=16 tokens, got 8"
    ),
    Bad(making(lambda: LouisKV(iterations=0)), "iterations: expected at least 1, got 0"),
    Bad(
        making(lambda: LouisKV(segment=(9, 4))),
        "segment: expected 1 <= shortest <= longest, got .9, 4",
    ),
    Bad(making(lambda: LouisKV(segment=(0, 4))), "segment: expected 1 <= shortest"),
    Bad(making(lambda: LouisKV(sinks=-1)), "sinks: expected at least 0, got -1"),
    Bad(making(lambda: LouisKV(local=0)), "local: expected at least 1 token, got 0"),
    Bad(making(lambda: LouisKV(newest=257)), "newest: expected 0 to local=256 tokens, got 257"),
    Bad(making(lambda: LouisKV(dense_layers=-1)), "dense_layers: expected at least 0, got -1"),
    Bad(
        making(lambda: KVCache(LouisKV(dense_layers=4), 4)),
        "LouisKV: dense_layers: expected fewer than the 4 layers of this model, got 4",
    ),
    Bad(
        making(lambda: METHODS["quest"](page_size=0)), "Quest: page_size: expected at least 1 token"
    ),
    Bad(
        making(lambda: METHODS["free-kv"](tau=3)),
        "FreeKV: tau: expected a number from -1 to 2, got 3",
    ),
    Bad(
        making(lambda: METHODS["stride-retrieval"](stride=0)),
        "stride: expected at least 1 step, got 0",
    ),
    Bad(
        making(lambda: METHODS["cluster-kv"](output_window=0)), "output_window: expected at least 1"
    ),
    Bad(
        making(lambda: METHODS["cluster-kv"](output_cluster=0)),
        "output_cluster: expected at least 1",
    ),
    Bad(making(lambda: LouisKV.example(3)), "budget: expected at least sinks"),
    Bad(making(lambda: TidalDecode(recent=0)), "recent: expected 1 to budget=1024 tokens, got 0"),
    Bad(making(lambda: LessIsMore(budget=128, recent=129)), "recent: expected 1 to budget=128"),
    Bad(
        making(lambda: KVCache(TidalDecode(dense_layers=2, selecting=(3,)), 8)),
        "dense_layers=2, which must select",
    ),
    Bad(making(lambda: KVCache(TidalDecode(selecting=(2, 8)), 8)), "up to 7, got"),
    Bad(making(lambda: KVCache(TidalDecode(selecting=()), 8)), "selecting: expected layers"),
    Bad(making(lambda: KVCache(TidalDecode(selecting=(-1,)), 8)), "selecting: expected layers"),
    Bad(
        making(lambda: Delethink(**SHORT | {"chunk": 6})),
        "chunk: expected more than carry=6 tokens, got 6",
    ),
    Bad(making(lambda: Delethink(**SHORT | {"carry": 0})), "carry: expected at least 1"),
    Bad(making(lambda: Delethink(**SHORT | {"head": 6})), "head: expected fewer than carry=6"),
    Bad(making(lambda: Delethink(**SHORT | {"head": -1})), "head: expected fewer"),
    Bad(
        making(lambda: Delethink(**SHORT | {"head": 13, "variant": "paper"})),
        "head: expected fewer than chunk=13",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"head": -1, "variant": "paper"})),
        "head: expected fewer than chunk=13",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"max_chunks": 0})),
        "max_chunks: expected at least 1, or None, got 0",
    ),
    Bad(making(lambda: Delethink(**SHORT | {"piece": 0})), "piece: expected at least 1"),
    Bad(
        making(lambda: Delethink(**SHORT | {"variant": "v2"})),
        "variant: expected one of exact_bound, paper, got 'v2'",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"reset": "cold"})),
        "reset: expected one of prefill, streaming, rotate, got 'cold'",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"inner": Delethink()})),
        "inner: expected another method, or None",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"inner": "delta"})),
        "inner: expected another method, or None, got 'delta'",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"inner": LazyEviction, "reset": "rotate"})),
        "inner: expected another method",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"inner": LazyEviction(), "reset": "rotate"})),
        "LazyEviction drops some",
    ),
    Bad(
        making(lambda: Delethink(**SHORT | {"inner": LouisKV(), "reset": "rotate"})),
        "LouisKV drops some, or keeps them elsewhere",
    ),
    Bad(making(lambda: Delta(recent=0)), "recent: expected at least 1 page, got 0"),
    Bad(making(lambda: Delta(warmup=-1)), "warmup: expected at least 0 layers, got -1"),
    Bad(making(lambda: Delta(budget=-16)), "at least .recent . sinks. . page_size"),
    Bad(making(lambda: Delta.example(4)), "at least .recent . sinks. . page_size = 8"),
    Bad(
        making(lambda: Delta.published("gpt-2")), "no published delta layers for 'gpt-2'.*calibrate"
    ),
    Bad(
        making(lambda: LouisKV(host_limit=-1)),
        "host_limit: expected at least 0 bytes, or None, got -1",
    ),
    Bad(making(lambda: LouisKV(segment=(4, 9, 12))), "segment: expected a tuple of 2", TypeError),
    Bad(making(lambda: LouisKV(segment=4)), "segment: expected a tuple of 2, each", TypeError),
    Bad(making(lambda: Delta(delta_layers=(2, 3.5))), "delta_layers: expected a tuple", TypeError),
    Bad(making(lambda: Delta(delta_layers=2)), "delta_layers: .* or None, got 2", TypeError),
    Bad(making(lambda: H2O(recent=-1)), "H2O: recent: expected at least 0 tokens, or None, got -1"),
    Bad(making(lambda: RandomEviction(recent=-1)), "recent: expected at least 0 tokens, got -1"),
    Bad(making(lambda: LagKV(partition=0)), "partition: expected at least 1 token, got 0"),
    Bad(making(lambda: LagKV(sinks=-1)), "LagKV: sinks: expected at least 0 tokens, got -1"),
    Bad(making(lambda: SnapKV(kernel=0)), "SnapKV: kernel: expected at least 1 token, got 0"),
    Bad(making(lambda: RKV(kernel=-1)), "RKV: kernel: expected at least 1 token, got -1"),
    Bad(making(lambda: RKV(trade_off=1.5)), "trade_off: expected 0 to 1, got 1.5"),
    Bad(making(lambda: RKV(similar=-2.0)), "similar: expected a cosine, -1 to 1, got -2.0"),
    Bad(
        making(lambda: TidalDecode(dense_layers=-1)),
        "dense_layers: expected at least 0, or None, got -1",
    ),
    Bad(making(lambda: RandomPages(page_size=0)), "page_size: expected at least 1 token, got 0"),
    Bad(
        making(lambda: Delethink.example(2)), "Delethink: budget: expected at least 3 tokens, got 2"
    ),
]


def junk():
    """Of every method, every number, flag and word as another type, and every float as NaN."""
    for name, method in METHODS.items():
        for field in dataclasses.fields(method):
            said = rf"^kvcomp\.{method.__name__}: .*{field.name}"
            kinds = [kind for kind in WORDS if kind.__name__ in str(field.type)]
            values = {str: [3], bool: ["yes", 1], int: [2.5, "many", True], float: ["many", True]}
            for value in values[kinds[0]] if kinds else ():
                expected = rf"{said}: expected .*, got {value!r}$"
                yield Bad(with_field(name, field.name, value), expected, TypeError)
            if kinds == [float]:
                for value in (math.nan, math.inf, -math.inf):
                    yield Bad(with_field(name, field.name, value), said)


def with_field(name, field, value):
    return making(lambda: dataclasses.replace(METHODS[name].example(), **{field: value}))


ROWS += junk()
