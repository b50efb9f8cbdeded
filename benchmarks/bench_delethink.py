"""Delethink: accuracy, memory and time of thinking in chunks.

    python benchmarks/bench_delethink.py --part scaling --json delethink-scaling.json
    python benchmarks/bench_delethink.py --part scaling --budgets 2048 8192 --nodes 16
    python benchmarks/bench_delethink.py --smoke                  # a few seconds, for CI

scaling  Walks of the reasoner far beyond the 4096 positions that it knows, with Delethink and with
         dense attention: which steps are right in each chunk, which answers at each thinking
         budget, K and V, and time.
curve    K and V, and time per token, on a random model of a real shape; the two take turns.
sweep    Chunk, carry and head at one thinking budget; down to a carry that loses the state.
rotate   What becomes of distributions and answers where the carry's keys are rotated and not
         encoded anew.
stall    How long decoding stands still at a boundary, with the next context encoded there or in
         the background, with a free core and without.

Decoding is greedy, on the CPU.

How to read a row:

* `scaling` and `curve` have a row for each chunk, and one for dense attention over the same
  tokens; the two decode in one process and take turns of a sixteenth of a chunk. `steps` is the
  share of the chunk's tokens that belong to a right step. A step is right if it follows from the
  prompt and from the step before as written, so one slip costs one step. `ms` is the median of the
  steps that cross no boundary, `with boundaries` the mean of all. `budget` grades the same
  answers, cut short; its `answers` counts those without a wrong step. The model of `curve` has
  random weights and half of Qwen3-0.6B's width everywhere.
* `rotate` feeds the right answer token by token and compares the distributions of the next token,
  in nats, from the second chunk on. `after 1` is the first token behind a boundary. `prefill fp32
  | prefill bf16` shows how much is rounding. `foreseen` is the share of the given tokens that each
  contender would have chosen. Then all of them decode freely.
* `stall`: `hidden` is the share of a boundary's time that encoding ahead in the background saves.
  The contenders take turns just behind a boundary, when no background is at work. `ms in the ...%
  beside which it encodes` covers the steps in which the process used more than 1.3 seconds of CPU
  time per second. A core is free if the process may use more cores (`sched_getaffinity`) than
  decoding has threads. Without a free core nothing is hidden: encoding ahead spreads over the
  steps, and shows in tokens per second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from delethink.rotate import bench_rotate
from delethink.scaling import bench_curve, bench_scaling
from delethink.stall import bench_stall
from delethink.sweep import bench_sweep
from harness.record import OtherLoad, begin, conclude, meta, shown

BENCHMARKS = {
    "scaling": bench_scaling,
    "sweep": bench_sweep,
    "rotate": bench_rotate,
    "curve": bench_curve,
    "stall": bench_stall,
}
SMOKE = {
    "budgets": [64, 96],
    "nodes": [4],
    "problems": 2,
    "chunk": 48,
    "carry": 24,
    "head": 8,
    "sweep_tokens": 48,
    "sweep_problems": 2,
    "rotate_chunk": 16,
    "rotate_boundaries": 2,
    "rotate_problems": 2,
    "stall_boundaries": 2,
    "pieces": [8],
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    add(
        "--budgets",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096, 6144, 8192],
        metavar="N",
        help="thinking tokens, of scaling and curve; the largest is decoded",
    )
    add("--nodes", type=int, nargs="+", default=[16, 48], help="of scaling; others take the first")
    add("--problems", type=int, default=8, help="of scaling")
    add("--chunk", type=int, default=1024, metavar="C", help="not of sweep, rotate")
    add("--carry", type=int, default=512, metavar="M", help="the same")
    add("--head", type=int, default=100, metavar="H", help="the same")
    add("--sweep-tokens", type=int, default=1536, metavar="N")
    add("--sweep-problems", type=int, default=4)
    add("--rotate-chunk", type=int, default=512, metavar="C")
    add("--rotate-boundaries", type=int, default=8)
    add("--rotate-problems", type=int, default=4)
    add("--stall-boundaries", type=int, default=5)
    add("--pieces", type=int, nargs="+", default=[64, 128, 256], metavar="G", help="of stall")
    add("--threads", type=int, help="not of stall; default: 1 for the reasoner, else torch's")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE")
    add("--smoke", action="store_true", help="tiny inputs, a few seconds: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    load, cores = OtherLoad(), torch.get_num_threads()
    chosen = {k: v for k, v in vars(options).items() if k not in ("json", "threads")}
    facts = meta("delethink", "cpu", **chosen)
    begin(facts, options.smoke)
    rows = []
    for part in options.part:
        small = part in ("scaling", "sweep", "rotate")  # so small a model gains nothing from more
        torch.set_num_threads(options.threads or (1 if small else cores))
        print(f"\n{part}", flush=True)
        rows += shown(BENCHMARKS[part](options))
    torch.set_num_threads(cores)
    conclude(options.json, facts, rows, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
