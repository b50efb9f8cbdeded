"""The eviction and the retrieval family on the bundled reasoner, all members at the same bound.

    python benchmarks/bench_families.py --json families.json
    python benchmarks/bench_families.py --part tight lag --alpha 0.2
    python benchmarks/bench_families.py --smoke                       # a few seconds, for CI

half    Walks over 16 nodes, decoded freely, at half of the full cache's peak, with evictions every
        128 steps.
tight   Walks over 64 nodes of which 8 can be reached: the prompt is longer than the bound, and 7 of
        8 facts never matter. The right answer is given token by token and each prediction graded,
        so that one lost fact costs its own steps and no others. A sweep over the bound.
lag     The same at one bound: every score with evictions every 1, 16 and 64 steps.
link    A long prompt and a long answer, given token by token, a quarter of the final context on the
        device: what each retrieval method gets right, and the bytes it brings over the link.

Every eviction method gets the same bound, budget + window tokens a layer, and the same windows, so
that lag and score can be told apart; every retrieval method gets the same number of tokens on the
device. LazyEviction and RaaS share one alpha: `--alpha`, or the one that `LazyEviction.calibrate`
chooses on other problems.

How to read a row: `W` is the window, `steps` the share of right steps, `first` the same over the
steps whose fact had not been used before. `kept` is the mean number of tokens a layer holds, `rate`
the selections per step and layer, `link` the K and V that came from host memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from families.parts import PARTS, SMOKE, calibrated
from families.reasoner import Reasoner
from harness.record import begin, meta, shown, write_json
from kvcomp.cli.common import pick_device
from kvcomp.cli.output import check_output

NAMES = [part.name for part in PARTS]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=NAMES, default=NAMES)
    add("--problems", type=int, default=8, metavar="N", help="walks of each part")
    add("--alpha", type=float, help="of LazyEviction and RaaS; default: calibrated")
    add("--device", metavar="NAME", help="default: the GPU where there is one")
    add("--json", type=Path, metavar="FILE")
    add("--smoke", action="store_true", help="tiny inputs, a few seconds: does it run?")
    options = parser.parse_args(argv)
    if options.problems < 1:
        parser.error(f"--problems: expected at least 1, got {options.problems}")
    if options.alpha is not None and not 0 < options.alpha < 1:
        parser.error(f"--alpha: expected a number between 0 and 1, got {options.alpha}")
    if options.smoke:
        options.problems, options.alpha = 1, options.alpha or 0.2
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        check_output(options.json)
        device = pick_device(options.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if device == "cpu":
        torch.set_num_threads(1)  # so small a model gains nothing from more
    reasoner = Reasoner(device)
    if options.alpha is None:
        options.alpha = calibrated(reasoner, next(part for part in PARTS if part.name == "lag"))
    facts = meta(
        "families",
        device.partition(":")[0],
        problems=options.problems,
        alpha=options.alpha,
    )
    begin(facts, options.smoke)
    print(f"alpha {options.alpha}, {options.problems} problems", flush=True)
    rows = []
    for part in SMOKE if options.smoke else PARTS:
        if part.name in options.part:
            rows += shown(part.rows(reasoner, options.problems, options.alpha))
    if options.json:
        write_json(options.json, facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
