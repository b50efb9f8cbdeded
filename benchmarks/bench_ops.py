"""Micro-benchmarks of the ops: every implementation beside the ways PyTorch has to do the same.

    python benchmarks/bench_ops.py                                  # a few minutes on two cores
    python benchmarks/bench_ops.py --op decode_attention --dtype bf16 --tokens 16384 65536
    python benchmarks/bench_ops.py --device cuda --json ops.json
    python benchmarks/bench_ops.py --smoke                          # a few seconds, for CI

GB/s counts what must be moved (K and V once, plus side inputs and outputs), whatever a contender
really touches, and is compared with a bandwidth probe that runs in the same rounds. A contender
whose result is wrong gets no ratio, and the exit code is 1. Each family of ops has a file in
`ops/`: what it is timed on, what it is compared with, and what it must return.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from harness.contenders import Settings
from harness.record import OtherLoad, Row, conclude, header, meta, write_json
from harness.timing import LEAST_SAMPLES
from kvcomp.probe import bandwidth_probe
from ops import attention, eviction, fetching, lazy_eviction, overhead, pages, retrieval
from ops.common import DTYPES, PAGE, heads_of

SHAPES = ("32/8x128", "28/4x128", "12/2x128", "16/8x64")
SELECTIONS = (  # scores, selected: DELTA's pages of 16, then tokens
    *((1024, 64), (4096, 128), (8192, 128)),
    *((4096, 256), (4096, 2048), (16384, 2048), (65536, 4096)),
)
EVICTIONS = ((1492, 175), (1024, 128), (8192, 8192))  # budgets and windows: published, and a half

BENCHMARKS = {
    "decode_attention": attention.bench_decode_attention,
    "merge_states": attention.bench_merge_states,
    "page_scores": pages.bench_page_scores,
    "select_pages": pages.bench_select_pages,
    "attend_and_select": pages.bench_attend_and_select,
    "attention_hits": eviction.bench_attention_hits,
    "recurrence_update": eviction.bench_recurrence_update,
    "select_victims": eviction.bench_select_victims,
    "compact_kv": eviction.bench_compact_kv,
    "rotate_keys": eviction.bench_rotate_keys,
    "kmeans": retrieval.bench_kmeans,
    "query_similarity": retrieval.bench_query_similarity,
    "segment_boundaries": retrieval.bench_segment_boundaries,
    "store_segments": retrieval.bench_store_segments,
    "unit_scores": retrieval.bench_unit_scores,
    "select_units": retrieval.bench_select_units,
    "fetch_rows": fetching.bench_fetch_rows,
    "lazy_eviction": lazy_eviction.bench_lazy_eviction,
    "overhead": overhead.bench_overhead,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--op",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        metavar="NAME",
        help=", ".join(BENCHMARKS),
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    add(
        "--shape",
        nargs="+",
        type=heads_of,
        default=[heads_of(s) for s in SHAPES[::2]],
        metavar="Hq/HkvxD",
        help=f"for example {' '.join(SHAPES)}",
    )
    add("--tokens", nargs="+", type=int, default=[4096, 16384], metavar="N")
    add(
        "--batch",
        nargs="+",
        type=int,
        default=[1, 4],
        metavar="B",
        help="those after the first are for the first shape only",
    )
    add("--budget", type=int, default=2048, metavar="K", help="tokens attended by sparse variants")
    add("--threads", type=int, help="default: what torch uses")
    add("--repeats", type=int, default=30)
    add(
        "--baseline-budget",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="for one contender of a group; a slow one is timed less often",
    )
    add("--json", metavar="FILE")
    add("--smoke", action="store_true", help="tiny inputs, a few seconds: does it run?")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if any(tokens % PAGE for tokens in [*options.tokens, options.budget]):
        parser.error(f"--tokens and --budget must be multiples of {PAGE}")
    options.selections, options.evictions = SELECTIONS, EVICTIONS
    options.victims, options.units = ((1667, 175), (16384, 175)), (1, 8, 32)
    options.unit_counts = (2048, 8192)  # of prompts of 32K and 128K tokens
    if options.smoke:
        options.shape, options.tokens, options.batch = [(4, 2, 64)], [256], [1, 2]
        options.budget, options.repeats, options.selections = 64, LEAST_SAMPLES, [(512, 32)]
        options.evictions, options.victims, options.units = [(96, 32)], [(128, 32)], (1, 2)
        options.dtype, options.unit_counts = options.dtype[:2], (128,)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    load = OtherLoad()
    probe = bandwidth_probe(options.device, *[1 << 20] * options.smoke)
    run = Settings(
        options.device, options.repeats, options.baseline_budget, not options.smoke, probe
    )
    ceiling = {"gbps": probe.gbps, "probe": probe.name}
    facts = meta("ops", options.device, ceiling=ceiling)
    print(header(facts), flush=True)
    if options.smoke:
        print("smoke test: the inputs are too small for these figures to mean anything")
    rows: list[Row] = []
    for op in options.op:
        for group in BENCHMARKS[op](options, run):
            print("", *(row.line() for row in group), sep="\n", flush=True)
            rows += group
            if options.json:  # what is there survives an interruption
                write_json(options.json, facts, rows)
    conclude(options.json, facts, rows, load)
    wrong = sum(not row.correct for row in rows)
    if wrong:
        print(f"{wrong} rows with a wrong result", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
