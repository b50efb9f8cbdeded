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

How to read a row of `share`: `step` is a layer's decode step without the append of K and V,
`attention` the same attention alone over the resident tokens, `retrieval` the share of the step
that is not attention. Times are medians within each kind of step (retrieving or not, storing a
segment or not), averaged by how often each kind happens. Other memory is read before each of them,
as other layers and the weights would do; `append` runs with a warm interpreter. `missing` is the
share of a selection that came over the link, `link` the bytes fetched and stored per token,
`recall` the resident share of the best set's attention, `error` the output's distance from dense
attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from harness.record import OtherLoad, begin, conclude, meta, shown
from ops.common import DTYPES, heads_of
from retrieval.memory import bench_memory
from retrieval.prefill import bench_prefill
from retrieval.share import bench_share

BENCHMARKS = {"share": bench_share, "prefill": bench_prefill, "memory": bench_memory}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
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
    begin(facts, options.smoke)
    rows = []
    for part in options.part:
        print(f"\n{part}", flush=True)
        rows += shown(BENCHMARKS[part](options))
    conclude(options.json, facts, rows, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
