"""Micro-benchmarks of the ops: every implementation beside the ways PyTorch has to do the same.

    python benchmarks/bench_ops.py                                  # a few minutes on two cores
    python benchmarks/bench_ops.py --op decode_attention --dtype bf16 --tokens 16384 65536
    python benchmarks/bench_ops.py --device cuda --json ops.json
    python benchmarks/bench_ops.py --smoke                          # a few seconds, for CI

GB/s counts what must be moved (K and V once, plus side inputs and outputs), whatever a contender
really touches, and is compared with a bandwidth probe that runs in the same rounds. A contender
whose result is wrong gets no ratio, and the exit code is 1. Each family of ops has a file in
`ops/`: what it is timed on, what it is compared with, and what it must return.

How to read a row:

* GB/s divides the bytes that must be moved (K and V once, side inputs and outputs) by the median
  time, no matter how much a contender really touches. The % beside it relates that to the probe in
  the same rounds: the fastest plain read that torch has, or a device copy on a GPU. The probe does
  not prefetch, so a kernel can pass 100 %.
* `+-0.8%` compares the medians of the first and the second half of the rounds, that is, two runs
  of the same thing. A smaller difference between two rows is no result.
* On a GPU a sample is the replay of a CUDA graph of 20 calls or more on different buffers. A call
  that waits for the GPU cannot be captured: it says `no graph`, and its launches count too. The
  baselines include SDPA with each of its backends, compiled FlexAttention, flash-attn and
  FlashInfer; one that is not installed or refuses a shape is left out and named.
* `sdpa-gqa 24x`: 24 times faster than that baseline, by medians. The ratio of the minima is
  printed too where it differs by more than 15 %: the machine was busy, and the last line says how
  busy.
* `own-dense 6.7x of 8x`: against the same kernel over all tokens, and the ratio that the bytes
  allow. `with logits` also writes the logits, `delta layer` also scores and selects pages,
  `pages16 all` lists all pages, `ragged` has lengths from a quarter of n to n.
* `compact_kv` counts the rows that must move, read and written; its probe is a plain copy. PyTorch
  is given the list of the tokens that stay, ours starts from those that leave.
* `lazy_eviction` is one layer in its steady state: `decode` is the attention of a step, `tracked`
  adds logits and hit bits, `tracked, all` adds a 32nd of a replay of 32 steps. `+4.1% (min +3.8%)
  over the baseline` relates medians (and minima) to `decode`. `evict` is one whole
  `LazyEviction.evict`; `decode 2x` beside it means that it takes half as long as one `decode`.
* `eight_bits` is attention over K and V in eight bits, `cpu 8`, against the same kernel over the
  same tokens in 16, `cpu 16`; behind `of` is the ratio that the bytes allow.
* `fetch_rows`: `refetch` brings all wanted rows, `torch-delta` only the missing ones; `missing`
  says how many of K those are. On a GPU it counts the bytes over the link, beside one large copy
  from pinned memory and `copies`, which asks row by row. In `select_units`, `topk` treats every
  unit as if it had 16 tokens.
* `latent_attention` has its own sizes, those of DeepSeek-V3 and V2-Lite. `matmul` is two products
  of the op's sizes without a softmax; `layer` is a layer's step between queries and outputs of its
  heads, and that of transformers expands K and V of all tokens.
* `overhead` shows the public call, the native call beneath it, and the difference: Python,
  dispatcher, and allocating the outputs.
* `WRONG RESULT`: the error is over its budget.

Attention logits have a realistic spread: 5 % of the tokens hold 90 % of the probability. K, V and
index lists rotate over sets that together touch four times the last-level cache. The inputs of
`merge_states`, `select_pages` and the small eviction ops stay warm, as in a real decode, which has
just computed them.
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
from ops import (
    append_attention,
    attention,
    codes,
    eviction,
    fetching,
    latent,
    lazy_eviction,
    linear,
    overhead,
    pages,
    retrieval,
    slots,
)
from ops.common import DTYPES, PAGE, heads_of

SHAPES = ("32/8x128", "28/4x128", "12/2x128", "16/8x64")
SELECTIONS = (  # scores, selected: DELTA's pages of 16, then tokens
    *((1024, 64), (4096, 128), (8192, 128)),
    *((4096, 256), (4096, 2048), (16384, 2048), (65536, 4096)),
)
EVICTIONS = ((1492, 175), (1024, 128), (8192, 8192))  # budgets and windows: published, and a half

BENCHMARKS = {
    "decode_attention": attention.bench_decode_attention,
    "append_attention": append_attention.bench_append_attention,
    "second_turn": append_attention.bench_second_turn,
    "latent_attention": latent.bench_latent_attention,
    "merge_states": attention.bench_merge_states,
    "linear_rows": linear.bench_linear_rows,
    "norm_rows": linear.bench_norm_rows,
    "rotate_rows": linear.bench_rotate_rows,
    "quantize_rows": codes.bench_quantize_rows,
    "hadamard": codes.bench_hadamard,
    "eight_bits": codes.bench_eight_bits,
    "page_scores": pages.bench_page_scores,
    "select_pages": pages.bench_select_pages,
    "append_rows": slots.bench_append_rows,
    "store_slots": slots.bench_store_slots,
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
