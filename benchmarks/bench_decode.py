"""One decode step, and a generation, of models of real shapes: ours beside stock transformers.

    python benchmarks/bench_decode.py --json decode.json              # Qwen3-0.6B, 2K to 32K tokens
    python benchmarks/bench_decode.py --shape r1-distill-qwen-1.5b --batch 1 4 --tokens 2048 8192
    python benchmarks/bench_decode.py --part generate --tokens 2048 --generate 256
    python benchmarks/bench_decode.py --smoke                         # a few seconds, for CI

step      ms per step of a model with random weights, whose caches are filled with random K and V
          instead of a prefill. Each contender takes its steps in turn with stock (DynamicCache,
          sdpa; the concatenation of K and V at every step is a part of it) and a bandwidth probe.
          Beside it what the step had to read, how long that takes at the probe's rate, and how a
          step divides between attention, cache update, linear layers and the rest.
generate  ms per token of a generation through `generate`, with what seldom happens in a step.
graph     a step as one CUDA graph: Full, Delta, LazyEviction with its share of an eviction, and
          transformers' StaticCache, and their means over the contexts; with --device cuda --shape
          r1-distill-qwen-1.5b --batch 64 --tokens 1843 5530 9216 12902 16589 the published
          comparison of DELTA, over 18K tokens.
peer      a step of other engines beside kvcomp's and stock transformers', dense attention all, the
          same weights; each engine has a process of its own, and takes its steps in turn:
          `--model smollm2-135m --peer vllm=/path/to/python openvino=... llama.cpp=...`. NAME alone
          means this Python. It also compares the first greedy tokens with those of transformers.

With --json, an interrupted run of one of the parts step and peer goes on with the first context
that it did not finish.

`--method full-compiled full-frozen` adds full attention with a step that inductor has compiled,
over weights as they are and over packed ones.

A contender stands where it would after n tokens: LazyEviction keeps half of them, the others have
the budgets of their papers; Delethink is in the middle of a chunk, and what encoding the carry of
the next adds to a token is shown apart. LouisKV's prompt is clustered in one iteration.

How to read a row: `stock 7.1x` compares with stock transformers (`hf dynamic`) in the same rounds;
stock's own row has the rounds with all contenders. `KV` is what attention reads in a step,
`ceiling` the time that KV and weights take at the probe's rate in those rounds, and the percentage
is the ceiling over the measured time. `attention` holds everything a method does at its hook
(scores, selections, link), `update` the append, `rest` norms, rotation and Python. These parts
come from extra steps whose every call is timed, so they divide a step slightly longer than `ms`.
LouisKV's queries turn every eight steps. Rare work (evictions, growing slabs) shows only in the
rows of `generate`; `and 1.7 ms per token for carries` comes on top of a Delethink step.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from decode.contenders import COMPILED, OURS, STATIC, STOCK
from decode.generation import bench_generation
from decode.graph import bench_graphs
from decode.models import SHAPES
from decode.peer import bench_peer, is_peer, named
from decode.steps import bench_steps
from harness.kv import add_kv, labels
from harness.record import NOT_INSTALLED, OtherLoad, begin, conclude, meta, shown, write_json
from ops.common import DTYPES

BENCHMARKS = {
    "step": bench_steps,
    "generate": bench_generation,
    "graph": bench_graphs,
    "peer": bench_peer,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=BENCHMARKS, default=["step"])
    add("--shape", choices=SHAPES, default="qwen3-0.6b")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--tokens", type=int, nargs="+", default=[2048, 8192, 16384, 32768], metavar="N")
    add("--batch", type=int, nargs="+", default=[1], metavar="B")
    add(
        "--method",
        nargs="*",
        choices=(STATIC, *OURS, *COMPILED),
        default=[STATIC, *OURS],
        metavar="NAME",
    )
    add("--model", metavar="NAME", help="peer: real weights, of `kvcomp get`; else --shape")
    add(
        "--peer",
        nargs="*",
        type=named,
        default=[named("llama.cpp")],
        metavar="NAME[=PYTHON]",
        help="llama.cpp, openvino, vllm, and the Python of their environments",
    )
    add_kv(add)
    add("--prompt", type=int, default=512, metavar="N", help="of a Delethink context")
    add("--rounds", type=int, default=24, help="most steps of a contender; a multiple of 8")
    add("--seconds", type=float, default=25.0, help="for all of a race; 8 rounds in any case")
    add("--generate", type=int, default=256, metavar="N")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="default: what torch uses")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE")
    add("--smoke", action="store_true", help="a tiny model, a few seconds: does it run?")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.device == "cuda" and set(options.method) & set(COMPILED):
        parser.error(f"--method {' '.join(COMPILED)}: for --device cpu")
    if "peer" in options.part and (options.device, options.dtype) != ("cpu", "bf16"):
        parser.error("--part peer: expected --device cpu and --dtype bf16")
    if options.rounds % 8 or options.rounds < 8:
        parser.error(f"--rounds: expected a multiple of 8, got {options.rounds}")
    ours = [name for name in options.method if name in OURS]
    options.method += [label for label in labels(ours, options.kv) if label not in ours]
    if "model" not in options.kv:
        options.method = [name for name in options.method if name not in ours]
    if options.smoke:
        options.shape, options.tokens, options.prompt = "tiny", [256], 32
        options.rounds, options.generate = 8, 8
    options.done = set()
    return options


def begun(options: argparse.Namespace, facts: dict) -> list[dict]:
    """The rows of an earlier run of the same command; they are not measured again.

    Raises:
        ValueError: the file is from another command.
    """
    file = options.json and Path(options.json)
    if options.part not in (["step"], ["peer"]) or not file or not file.exists():
        return []
    content = json.loads(file.read_text())
    if content["meta"]["command"] != facts["command"]:
        raise ValueError(f"{file} is from another command: {content['meta']['command']}")
    rows = content["rows"]
    options.done = {(row["batch"], row["tokens"]) for row in rows if row["name"] == STOCK}
    return [row for row in rows if (row["batch"], row["tokens"]) in options.done]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    load = OtherLoad()
    names = ("part", "shape", "dtype", "batch", "tokens", "rounds", "generate")
    facts = meta("decode", options.device, **{name: getattr(options, name) for name in names})
    facts["command"] = re.sub(r" (\S+)=\S*python\S*", r" \1", facts["command"])
    begin(facts, options.smoke)
    rows = begun(options, facts)
    for part in options.part:
        print(f"\n{part}", flush=True)
        for row in shown(BENCHMARKS[part](options)):
            rows.append(row)
            if options.json:  # what is there survives an interruption
                write_json(options.json, facts, rows)
    conclude(options.json, facts, rows, load)
    if options.part == ["peer"] and options.peer and not any(map(is_peer, rows)):
        return NOT_INSTALLED
    return 0


if __name__ == "__main__":
    sys.exit(main())
