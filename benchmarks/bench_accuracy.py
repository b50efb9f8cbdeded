"""What methods cost in accuracy, at equal bytes.

    python benchmarks/bench_accuracy.py --json accuracy-study.json     # an hour; goes on
    python benchmarks/bench_accuracy.py --methods full delta h2o --budgets 1/4 512
    python benchmarks/bench_accuracy.py --model Qwen/Qwen3-8B --problems math500.jsonl
    python benchmarks/bench_accuracy.py --preset delta-aime24 --problems aime24.jsonl
    python benchmarks/bench_accuracy.py --part half --count 16
    python benchmarks/bench_accuracy.py --smoke                        # for CI
    python benchmarks/bench_accuracy.py --method delethink --budgets 2048 8192

study (the default) decodes problems freely with every method at several bounds on the bytes that a
sequence holds on the device: K and V, and what the method remembers beside them. Each method is as
large as the bound allows. Those that keep all K and V get the tokens of the bound for their sparse
layers, and hold what dense attention holds. Any model, any JSONL file of problems with answers; by
default the bundled reasoner, whose walks are graded step by step.

half, tight, lag and link are smaller studies of the reasoner, see `accuracy/parts.py`. With
--method delethink this is `bench_delethink.py --part scaling`, with its options.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import bench_delethink
from accuracy import parts
from accuracy.options import parse
from accuracy.study import Study
from harness.record import header


def run_study(options: argparse.Namespace) -> None:
    study = Study(options)
    facts, room = study.results.facts, study.room
    print(header(facts))
    print(
        f"{len(study.cells())} cells, {len(study.results.done())} of them done; a sequence has up"
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


def main(argv: Sequence[str] | None = None) -> int:
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--method", choices=["delethink"])
    chosen, rest = chooser.parse_known_args(argv)
    if chosen.method:
        return bench_delethink.main(["--part", "scaling", *rest])
    try:
        options = parse(rest, __doc__)
        if options.part != ["study"]:
            parts.run(options)
        elif options.smoke:
            smoke(options)
        else:
            run_study(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
