"""What methods cost in accuracy, at equal bytes.

    python benchmarks/bench_accuracy.py --json study.json              # an hour; goes on
    python benchmarks/bench_accuracy.py --methods full delta h2o --budgets 1/4 512
    python benchmarks/bench_accuracy.py --model Qwen/Qwen3-8B --problems math500.jsonl
    python benchmarks/bench_accuracy.py --preset delta-aime24 --problems aime24.jsonl
    python benchmarks/bench_accuracy.py --smoke                        # for CI

Every method decodes the same problems under several bounds on the bytes that a sequence may hold on
the device: K and V, and whatever the method remembers beside them. Each method is made as large as
the bound allows. By default the bundled reasoner is asked, and its walks are graded step by step;
`--model` and `--problems` take any model and any JSONL file of problems with answers.

How to read a row:

* A bound (`--budgets`) is a share of the K and V of the longest context, or a number of tokens.
  `peak` is measured: K and V in use and the method's own state (scores, hits, the index of what is
  in host memory), per sequence, in the largest batch. `accuracy/sizes.py` finds the size: it tries
  the method on random keys and makes it smaller until both fit. All other parameters are those of
  `Method.example` for contexts up to 4096 tokens, and the published ones or the defaults beyond;
  `--set METHOD.FIELD=VALUE` overrides them.
* `OVER` marks a peak more than 1 % above its bound. A method that cannot work at a bound gets a
  row with the reason.
* `keeps all` marks methods that save reads and no memory. For them the bound is the number of
  tokens that a sparse layer attends to, and the peak is the same as with dense attention.
* `steps` is a mean over problems with a bootstrap interval; several samples of one problem count
  as one value. `answers` has a Wilson interval over all answers, and counts every sample. Both are
  at 95 %.
* `--seeds` draws other walks for the reasoner. For a file it repeats the same problems with
  another sampling seed, which changes nothing at temperature 0, the default.
* LazyEviction and RaaS use one alpha for all bounds: `LazyEviction.calibrate` finds it at the
  middle bound, on walks that are not graded. Other models use the published value.
* The JSON has a row per batch and is rewritten after each. Running the same command again
  continues with what is left, also with more methods, bounds or seeds; other settings are refused.
  `--cells N` stops after N cells.
* `--problems` takes the files that `kvcomp delethink` takes, with an answer in each line.
  `evaluation/problems.py` lists the field names it knows, `evaluation/checkers.py` the graders.
  `--preset NAME` decodes a paper's methods with its settings, see `evaluation/published.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from accuracy import options as command_line
from accuracy.study import Study
from harness.record import header


def run_study(options: argparse.Namespace) -> None:
    study = Study(options)
    facts, room = study.store.facts, study.room
    print(header(facts))
    print(
        f"{len(study.cells())} cells, {len(study.store.done())} of them done; a sequence has up"
        f" to {facts['context']} tokens, {room.context_bytes / 2**20:.2f} MiB",
        flush=True,
    )
    study.run()
    print("\nover all seeds, with 95 % intervals")
    for summary in study.summaries():
        print(summary.line(room.context_bytes))


def smoke(options: argparse.Namespace) -> None:
    """A study that stops after three cells, and goes on."""
    print("smoke test: the inputs are too small for these figures to mean anything")
    with tempfile.TemporaryDirectory() as folder:
        options.json = options.json or Path(folder) / "study.json"
        for options.cells in (3, None):
            run_study(options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return command_line.parse(argv, __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse(argv)
        if options.smoke:
            smoke(options)
        else:
            run_study(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
