"""What the methods do to a real language model.

    python benchmarks/bench_language.py --model smollm2-135m --json loss.json
    python benchmarks/bench_language.py --smoke                        # for CI

loss (the default) reads windows of real text token by token behind a prompt of an eighth, under
every method at equal bytes, and compares the predictions with those of dense attention. answers
asks for facts inside such a text, and counts the answers that dense attention gives and the method
still does; facts looks at what evicting methods still hold of them when they are asked for. free
lets every method write on by itself, and counts the tokens until its text departs from dense
attention's. calibrated measures a method's fields on two windows and compares it with its default
on others. premises looks for what the papers take for granted in the dense attention of the
windows. The model is a short name that `kvcomp get` knows, a folder or a hub name; the texts come
with Python. A run that was interrupted goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.kv import add_kv
from harness.record import header, meta
from harness.store import Row, Store
from kvcomp import METHODS
from kvcomp.cli.common import load, pick_device, pick_dtype
from kvcomp.cli.output import check_output
from kvcomp.progress import passing_bar
from kvcomp.reading import checksums, windows
from language import answers, calibrated, capture, facts, free, loss, premises
from language.door import attends
from language.questions import kinds
from language.rounding import KINDS

DEFAULTS = [name for name in METHODS if name != "delethink"]
SMOKE = {"model": "reasoner", "tokens": 64, "windows": 2, "batch": 2, "budgets": ["3/4"]}
SMOKE |= {"methods": ["full", "delta", "lazy-eviction", "louis-kv"], "dtype": "float32"}
SMOKE |= {"questions": 1, "kinds": ["pass-key", "late 0"]}
SMOKE |= {"kv": ["model", "int8"]}
SMOKE_PARTS = {"answers": {"tokens": 256}, "facts": {"tokens": 256}}
SMOKE_PARTS |= {"calibrated": {"tokens": 256, "methods": ["delta"], "kv": ["model"]}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=PARTS, help="default: loss; all of them with --smoke")
    add("--model", default="smollm2-135m", metavar="NAME", help="default: smollm2-135m")
    add(
        "--methods",
        nargs="+",
        default=DEFAULTS,
        metavar="NAME[:FIELD=VALUE,...]",
        help="default: all but delethink; a tuple's values are joined by +",
    )
    add("--budgets", nargs="+", default=["1/4", "3/8", "1/2"], metavar="SHARE")
    add("--tokens", type=int, default=2048, help="of a window; an eighth is the prompt")
    add("--windows", type=int, default=16, help="of loss and premises; prompts of free")
    add("--questions", type=int, default=8, metavar="N", help="of each kind in answers")
    add("--kinds", nargs="+", choices=kinds(10_000), metavar="KIND", help="default: all that fit")
    add("--batch", type=int, default=16, metavar="N", help="windows at once")
    add("--stack", type=int, default=8, metavar="N", help="methods that read them together")
    add("--device", metavar="NAME", help="default: the GPU where there is one")
    add("--dtype", metavar="NAME", default="float32")
    add_kv(add, KINDS)
    add("--threads", type=int, help="default: torch's")
    add("--cells", type=int, metavar="N", help="at most so many now; the same command goes on")
    add("--json", type=Path, metavar="FILE", help="one that is there already goes on")
    add("--smoke", action="store_true", help="tiny inputs: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def run_loss(options: argparse.Namespace) -> None:
    def line(row: Row, context_bytes: int) -> str:
        return loss.line(loss.summaries([row])[0], context_bytes)

    study = loss.LossStudy(*_loaded(options), options)
    _run_cells(study, line, options)
    print("\nover all windows, with 95 % intervals")
    for summary in loss.summaries(study.store.rows):
        print(loss.line(summary, study.lineup.room.context_bytes))


def run_answers(options: argparse.Namespace) -> None:
    _run_cells(study := answers.Answers(*_loaded(options), options), answers.line, options)
    print("\nanswered, of those that dense attention answers, with 95 % intervals")
    for row in study.store.rows:
        print(answers.line(row, study.lineup.room.context_bytes))


def run_facts(options: argparse.Namespace) -> None:
    _run_cells(
        facts.Facts(*_attending("facts", options, {"full_attention"}), options), facts.line, options
    )


def run_free(options: argparse.Namespace) -> None:
    _run_cells(study := free.FreeRunning(*_loaded(options), options), free.line, options)
    print("\nmeans over the prompts, with 95 % intervals")
    for row in study.store.rows:
        print(free.line(row, study.lineup.room.context_bytes))


def run_calibrated(options: argparse.Namespace) -> None:
    _run_cells(calibrated.Calibrated(*_loaded(options), options), calibrated.line, options)


def _loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    return load(options.model, pick_device(options.device), pick_dtype(options.dtype))


def _attending(part: str, options: argparse.Namespace, kinds: set[str]) -> tuple[Any, Any]:
    model, tokenizer = _loaded(options)
    if not attends(model, kinds):
        raise ValueError(
            f"kvcomp.language: --part {part}: expected a model with layers of"
            f" {' or '.join(sorted(kinds))} and plain logits, got {options.model}"
        )
    return model, tokenizer


def _run_cells(
    study: loss.LossStudy
    | answers.Answers
    | facts.Facts
    | free.FreeRunning
    | calibrated.Calibrated,
    line: Callable[[Row, int], str],
    options: argparse.Namespace,
) -> None:
    print(header(study.store.facts))
    print(f"{len(study.store.rows)} cells are done", flush=True)
    with _progress() as bar:
        task = bar.add_task("dense", total=None)

        def ticks(what: str, steps: int) -> Callable[[], None]:
            bar.reset(task, description=what, total=steps)
            return lambda: bar.advance(task)

        for count, row in enumerate(study.run(ticks), 1):
            print(line(row, study.lineup.room.context_bytes), flush=True)
            if count == options.cells:
                break


def run_premises(options: argparse.Namespace) -> None:
    model, tokenizer = _attending("premises", options, capture.KINDS)
    chosen = windows(tokenizer, options.windows, options.tokens)
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "tokens": options.tokens,
        "texts": checksums(),
    }
    about = meta("language-premises", model.device.type)
    store = Store(options.json, ("text", "first"), settings, about)
    print(header(about))
    done, count = store.done(), 0
    with _progress() as bar:
        task = bar.add_task("windows", total=len(chosen), completed=len(done))
        for window in chosen:
            if (window.text, window.first) in done or count == options.cells:
                continue
            store.add(premises.look(model, window))
            count += 1
            bar.advance(task)
    print(f"{len(store.rows)} windows")
    for line in premises.verdicts(store.rows):
        print(line)


def _progress() -> Progress:
    return passing_bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )


PARTS = {"loss": run_loss, "answers": run_answers, "free": run_free, "premises": run_premises}
PARTS |= {"facts": run_facts, "calibrated": run_calibrated}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.smoke:
        print("smoke test: the inputs are too small for these figures to mean anything")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        check_output(options.json)
        everything = options.smoke and not options.json  # a file holds one part
        for part in PARTS if everything and not options.part else [options.part or "loss"]:
            more = SMOKE_PARTS.get(part, {}) if options.smoke else {}
            PARTS[part](argparse.Namespace(**{**vars(options), **more}))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
