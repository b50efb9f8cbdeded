"""The command line of `bench_accuracy.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evaluation.checkers import CHECKERS
from evaluation.published import PRESETS
from harness.kv import add_kv
from kvcomp import METHODS
from kvcomp.cli.output import check_output

SMOKE = {
    "kv": ["model", "int8"],
    "methods": [
        *("full", "delethink", "delta", "random-pages", "lazy-eviction", "random-eviction"),
        *("louis-kv", "quest"),
    ],
    "budgets": ["3/4"],
    "seeds": range(1),
    "count": 1,
    "nodes": 4,
    "steps": 32,
    "alpha": 0.2,
}


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="a folder or hub name; default: the bundled reasoner")
    add("--problems", type=Path, metavar="FILE.jsonl", help="default: walks of the reasoner")
    add("--checker", choices=CHECKERS, default="math", help="of lines that name none")
    add("--preset", choices=PRESETS, metavar="NAME", help="a paper's: " + ", ".join(PRESETS))
    add("--methods", nargs="+", choices=["all", *METHODS], default=["all"], metavar="NAME")
    add(
        "--budgets",
        nargs="+",
        default=["1/4", "3/8", "1/2"],
        metavar="B",
        help="what a sequence may hold: shares of its longest context, or tokens",
    )
    add("--seeds", type=int, metavar="N", help="of walks, or of the sampling; default: 3")
    add("--count", type=int, metavar="N", help="problems; default: 8 walks a seed, all of a file")
    add("--batch", type=int, default=8, metavar="N", help="problems at once")
    add("--nodes", type=int, default=16, help="of a walk")
    add("--steps", type=int, default=256, help="of a walk")
    add("--max-new-tokens", type=int, metavar="N", help="default: the steps of a walk, or 4096")
    add("--temperature", type=float, help="0 is greedy; default: 0, or the preset's")
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--set", action="append", default=[], metavar="METHOD.FIELD=VALUE", help="of the study")
    add("--alpha", type=float, help="of LazyEviction and RaaS; default: calibrated for walks")
    add_kv(add)
    text = (
        "what --kv leaves a method at a bound; default: tokens, as many as the model's own K and V"
    )
    add("--equal", choices=["tokens", "bytes"], default="tokens", help=text)
    add("--device", metavar="NAME", help="default: the GPU where there is one")
    add("--dtype", metavar="NAME")
    add("--cells", type=int, metavar="N", help="at most so many now; the same command goes on")
    add("--json", type=Path, metavar="FILE", help="a study that is there already goes on")
    add("--smoke", action="store_true", help="tiny inputs: does it run?")
    options = parser.parse_args(argv)
    complete(options)
    return options


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on other options.

    Raises:
        ValueError: options that do not go together.
    """
    for name in ("seeds", "count", "batch", "nodes", "steps", "max_new_tokens", "cells"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"kvcomp.accuracy: --{name}: expected at least 1, got {value}")
    if options.preset is not None:
        _take_preset(options)
    options.model = options.model or "reasoner"
    options.seeds = range(3 if options.seeds is None else options.seeds)
    if "all" in options.methods:
        options.methods = sorted(METHODS, key=lambda name: METHODS[name].baseline)
    options.methods = list(dict.fromkeys(options.methods))
    if options.problems is None:
        if options.model != "reasoner":
            raise ValueError(
                "kvcomp.accuracy: --problems: expected a file, as only the reasoner has its"
                " own problems"
            )
        options.count = options.count or 8
    else:
        options.max_new_tokens = options.max_new_tokens or 4096
    if options.temperature is None and options.preset is None:
        options.temperature = 0.0
    if options.smoke:
        vars(options).update(SMOKE)
    check_output(options.json)


def _take_preset(options: argparse.Namespace) -> None:
    """What the command line does not say, as the paper has it."""
    preset = PRESETS[options.preset]
    if options.problems is None:
        raise ValueError(
            f"kvcomp.accuracy: --problems: preset {preset.name} needs {preset.data.name} as JSONL"
        )
    sampling = preset.sampling
    given = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    given |= {"max_new_tokens": sampling.max_new_tokens, "seeds": sampling.samples}
    given |= {"model": preset.models[0], "dtype": preset.dtype}
    for name, value in given.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    preset.full_model_name(options.model)
