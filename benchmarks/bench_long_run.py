"""A long run: 100,000 tokens of one sequence on the bundled reasoner, under each method.

    python benchmarks/bench_long_run.py --json long-run.json               # hours
    python benchmarks/bench_long_run.py --method lazy-eviction --tokens 20000
    python benchmarks/bench_long_run.py --smoke                            # some seconds, for CI

The tokens are those of the right answer and are given, so that all methods read the same text.
Every so many of them these are noted: what is held, reserved and in host memory, tensors and
objects of the process, the position that the newest token got and whether all got their own. At
every fifth look all rows of the first layer are made again from token and position, and compared;
these looks are printed and written, those between them are judged too. The exit code is 1 if
anything is not as it must be (`long_run/verdict.py`).

The file is written as the run goes on. Methods of a --json FILE that is there already are kept, so
that methods can be run one by one.

How to read a row: Python objects and memory blocks, and tensors where a method has a bound, are
compared between the second quarter and the second half of the run. `error` is the largest
difference of any first-layer row from one that a copy of the model's first layer makes from token
and position alone; `shifted` is the smallest difference one position off would have made. Beyond
the 4,096 positions that the reasoner was trained on, the text makes no sense to it: the
bookkeeping is tested, not the answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import kvcomp
import kvcomp.reasoner
from harness.record import header, meta, write_json
from kvcomp.methods import METHODS, Method
from kvcomp.reasoner import task
from long_run import teacher_forcing, verdict

NAMES = ("full", "delta", "lazy-eviction", "louis-kv", "delethink")
NODES = 16
TAU = -0.2  # with which about a tenth of the steps retrieve, as `LouisKV.calibrate` finds it
CHECKS = 5  # the first layer is compared at every so many looks; these are printed and written


def method_of(name: str, budget: int) -> Method:
    """For contexts of at most `budget` tokens; LouisKV in all layers, so that none grows."""
    method = METHODS[name].example(budget)
    if isinstance(method, kvcomp.LouisKV):
        return replace(method, dense_layers=0, tau=TAU)
    return method


def text(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and right answer, ids [n] and [tokens]."""
    problem = task.make_problem(NODES, -(-tokens // task.TOKENS_PER_STEP))
    words = ["<bos>", *problem.prompt.split()], problem.gold().split()[:tokens]
    prompt, stream = (torch.tensor([task.TOKEN_ID[word] for word in part]) for part in words)
    return prompt, stream


def line(log: teacher_forcing.Log) -> str:
    row = log.rows()[-1]
    checked = f"  {row['rows']} rows right to {row['error']:.1e}" if row["rows"] else ""
    return (
        f"{log.method.name:14} {row['tokens']:7} tokens  {row['kept']:6} kept"
        f"  {row['held'] / 1e6:7.2f} MB of {row['reserved'] / 1e6:7.2f}"
        f"  host {row['host'] / 1e6:6.1f} MB  resident {row['rss'] / 1e6:6.1f} MB"
        f"  {row['objects']:6} objects  {row['ms']:6.2f} ms{checked}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    add("--tokens", type=int, default=100_000, metavar="N", help="to decode")
    add("--every", type=int, metavar="N", help="tokens between looks; default: 100 looks")
    add("--budget", type=int, default=256, metavar="B", help="of the methods' parameters")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE")
    add("--smoke", action="store_true", help="240 tokens, a budget of 128")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.every, options.budget = 240, 20, 128
    options.every = options.every or max(1, options.tokens // 100)
    if options.tokens < 4 * options.every:
        parser.error(f"--tokens must be at least four times --every, {options.every}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(kvcomp.reasoner.path()).eval()
    prompt, stream = text(options.tokens)
    config = model.config
    token_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    facts = meta("long-run", "cpu", every=options.every, budget=options.budget, methods={})
    facts |= {"prompt": len(prompt), "token_bytes": token_bytes}
    print(header(facts), flush=True)
    rows: list[dict] = []
    if options.json and options.json.exists():
        there = json.loads(options.json.read_text())
        kept = {n: m for n, m in there["meta"]["methods"].items() if n not in options.method}
        facts["methods"], rows = kept, [r for r in there["rows"] if r["method"] in kept]
    wrong = 0
    for name in options.method:
        method = method_of(name, options.budget)
        facts["methods"][name] = repr(method)

        def looked(log: teacher_forcing.Log, before: Sequence[dict] = tuple(rows)) -> None:
            if log.looks % CHECKS == 0:
                print(line(log), flush=True)
                if options.json:
                    write_json(options.json, facts, [*before, *checked(log)])

        log = teacher_forcing.decode(
            model, method, prompt, stream, every=options.every, checks=CHECKS, looked=looked
        )
        rows += checked(log)
        for fault in verdict.faults(method, len(prompt), token_bytes, log.rows()):
            print(f"{name}: {fault}", file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


def checked(log: teacher_forcing.Log) -> list[dict]:
    return [{"method": log.method.name, **row} for row in log.rows() if row["rows"]]


if __name__ == "__main__":
    sys.exit(main())
