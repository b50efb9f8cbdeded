"""Strategies for long reasoning on the bundled reasoner: accuracy, tokens, memory, time.

    python benchmarks/bench_thinking.py --json thinking.json      # minutes
    python benchmarks/bench_thinking.py --part votes --problems 20
    python benchmarks/bench_thinking.py --smoke                   # some seconds, for CI

The question is: what is the running sum when the walk first comes to a certain node? The name of
that node ends the thought, and the sum two words later is the answer. Rows are drawn at a
temperature at which the reasoner makes mistakes. It was trained for the walk alone: it cannot read
notes or reviews, and nothing here says what a strategy does to a model that reasons in words.

Parts:
    votes       one row, majority, short-m@k and latent-trajectory, in turn on each problem
    signals     AUC of each signal of a trajectory, and of length alone, for rows that are right
    cgrs        what tentative answers cost: tokens fed for them, and time, with and without `lazy`
    hint        time of hints at the end of a sentence and of hints put back, to none
    stop        tokens of a thought against the bias of its end, and within a forced budget
    follow      a leader and a drafter: tokens by each, hand-overs, what reading the other's costs
    rounds      tokens and K/V of PDR and SR beside one row of as many tokens
    stand       tokens per second of a method with Stand and without; with --text also of prose
    drafted     what drafts change: right tokens, tokens in a forward, selections, recall, link, K/V
    chunks      tokens in a forward at the beginning of Delethink's chunks: table kept, or emptied
    packed      seconds and peak memory of prompts of different lengths in one row, against padding

With --text, `cgrs`, `hint`, `stop`, `follow` and `packed` take a model that writes prose instead.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from drafted import chunks, drafted
from following import follow
from packing import packed
from prose import PROSE
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import kvcomp
from harness.record import header, meta, write_json
from kvcomp import reasoner, thinking
from kvcomp.reasoner import task
from speculation import options_of_stand, stand

NODES = 8
TIGHT = 64  # tokens of a cache that is too small for a walk
SIGNALS = ("cumulative", "net", "aligned", "length")
WARM = {"temperature": 1.7, "top_p": 1.0}
Row = dict[str, Any]


class EndsBehind(LogitsProcessor):
    """Says EOS two words behind the end of the thought: the weight and the sum."""

    def __init__(self, end: int, eos: int, columns: int) -> None:
        self.end, self.eos, self.columns = end, eos, columns

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        over = (input_ids[:, self.columns : -2] == self.end).any(1, keepdim=True)
        only = torch.full_like(scores, float("-inf"))
        only[:, self.eos] = 0.0
        return torch.where(over, only, scores)


class Question:
    """A walk, the node that ends it, and the answer."""

    def __init__(self, seed: int, tokenizer: Any, steps: int) -> None:
        self.problem = task.make_problem(NODES, steps, seed=seed)
        self.inputs = tokenizer(self.problem.prompt, return_tensors="pt")
        self.columns = self.inputs["input_ids"].shape[1]
        walk = self.problem.walk()
        first: dict[str, int] = {}  # node -> step that comes to it for the first time
        for place, (_, node, _, _) in enumerate(walk):
            first.setdefault(node, place)
        self.end = max(first, key=lambda node: first[node])  # the last one that is reached
        self.answer = str(walk[first[self.end]][3])
        self.processor = EndsBehind(task.TOKEN_ID[self.end], tokenizer.eos_token_id, self.columns)

    def answer_of(self, text: str) -> str | None:
        words = text.split()
        if self.end not in words or len(words) < words.index(self.end) + 3:
            return None
        return words[words.index(self.end) + 2]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def contenders(
    run: Any, tokenizer: Any, question: Question, seed: int, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Ways to answer a question, by name."""
    given = {"answer_of": question.answer_of, "processors": [question.processor], "seed": seed}
    given |= {"max_new_tokens": options.steps * task.TOKENS_PER_STEP, **WARM}
    k, end = options.rows, question.end
    by = {"k": k, "keep": k // 2, "at": options.at, "block": options.at // 4}
    calls: dict[str, Callable[..., Any]] = {
        "one row": thinking.majority,
        f"majority@{k}": partial(thinking.majority, k=k),
        f"short-1@{k}": partial(thinking.short_m_at_k, k=k, m=1, end=end),
        f"short-3@{k}": partial(thinking.short_m_at_k, k=k, m=3, end=end),
        **{
            f"trajectory {signal}": partial(thinking.latent_trajectory, signal=signal, **by)
            for signal in SIGNALS
        },
    }
    given |= {"run": run, "tokenizer": tokenizer, "inputs": question.inputs}
    return {name: partial(call, **given) for name, call in calls.items()}


def votes(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Contenders in turn on each problem."""
    rows: dict[str, list[Row]] = {}
    for seed in range(options.problems):
        question = Question(seed, tokenizer, options.steps)
        with kvcomp.patch(model, kvcomp.Full()) as run:
            calls = contenders(run, tokenizer, question, seed, options)
            for name in random.Random(seed).sample(list(calls), len(calls)):
                found, seconds = timed(calls[name])
                row = {"right": found.answer == question.answer, "tokens": found.total_tokens}
                row |= {"path": found.sequential_tokens, "seconds": seconds}
                rows.setdefault(name, []).append(row)
    whole = rows[f"majority@{options.rows}"]
    return [vote_row(name, rows[name], whole) for name in calls]


def vote_row(name: str, rows: list[Row], whole: list[Row]) -> Row:
    """Means over problems, and ratios to plain majority."""
    pairs = list(zip(rows, whole, strict=True))
    return {
        "part": "votes",
        "contender": name,
        "accuracy": statistics.mean(row["right"] for row in rows),
        "tokens": statistics.mean(row["tokens"] for row in rows),
        "path": statistics.mean(row["path"] for row in rows),
        "tokens_ratio": sum(a["tokens"] for a, _ in pairs) / sum(b["tokens"] for _, b in pairs),
        "time_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
    }


def auc(values: Sequence[float], right: Sequence[bool]) -> float:
    """Share of pairs of a right and a wrong row in which the right one has more; ties are half."""
    good = [value for value, is_right in zip(values, right, strict=True) if is_right]
    bad = [value for value, is_right in zip(values, right, strict=True) if not is_right]
    pairs = [(a > b) + (a == b) / 2 for a in good for b in bad]
    return statistics.mean(pairs) if pairs else float("nan")


def signals(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Of rows of one problem, all at the same number of tokens; problems are averaged. Rows err as
    they are drawn at a high temperature, and once more as the cache holds too little besides."""
    rows = []
    for name, method in (("", kvcomp.Full()), (" evicting", kvcomp.LazyEviction(TIGHT, 8))):
        for signal, values in areas(model, tokenizer, method, options).items():
            row = {"part": "signals", "contender": signal + name, "auc": statistics.mean(values)}
            rows.append(row | {"of": len(values)})
    return rows


def areas(
    model: Any, tokenizer: Any, method: kvcomp.Method, options: argparse.Namespace
) -> dict[str, list[float]]:
    """The AUC of each signal, by problem where rows are right and wrong."""
    found: dict[str, list[float]] = {}
    most = options.at
    for seed in range(options.problems):
        question = Question(seed, tokenizer, options.steps)
        with (
            kvcomp.patch(model, method) as run,
            thinking.LatentTrajectory(run, most // 4) as heard,
        ):
            sampling = thinking.Sampling(**WARM, seed=seed, max_new_tokens=most)
            rows = thinking.Rows(
                run, question.inputs, sampling, copies=2 * options.rows, followers=[heard], eos=[]
            )
            while len(rows.all[0].ids) < most:
                rows.step()
            measured = {name: each.tolist() for name, each in heard.signals().items()}
        end = task.TOKEN_ID[question.end]
        measured["length"] = [row.ids.index(end) if end in row.ids else most for row in rows.all]
        texts = [tokenizer.decode(row.ids) for row in rows.all]
        graded = task.make_problem(NODES, most // task.TOKENS_PER_STEP, seed=seed)
        right = [task.grade(graded, text).step_accuracy == 1 for text in texts]
        for name, values in measured.items():
            value = auc(values, right)
            if value == value:
                found.setdefault(name, []).append(value)
    return found


def cgrs(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Greedy, so that all contenders decode the same tokens; a paragraph ends with each "9"."""
    question = Question(0, tokenizer, options.steps)
    tokens = options.steps * task.TOKENS_PER_STEP
    totals: dict[str, list[float]] = {}
    made: dict[str, Any] = {}
    words = {"words": ("from", "sum"), "ends": ("9",), "probe": "from sum", "close": "9"}
    settings = {"plain": None, "probing": {}, "lazy": {"lazy": True}, "fixed rate": {"rate": 0.25}}
    with kvcomp.patch(model, kvcomp.Full()) as run:
        for _ in range(3):
            for name, more in settings.items():
                chosen = []
                if more is not None:
                    made[name] = thinking.Cgrs(run, tokenizer, answer=8, **words, **more)
                    chosen = [made[name]]
                sampling = thinking.Sampling(temperature=0, max_new_tokens=tokens)
                rows = thinking.Rows(run, question.inputs, sampling, processors=chosen, eos=[])
                totals.setdefault(name, []).append(timed(rows.finish)[1])
    return [
        {
            "part": "cgrs",
            "contender": name,
            "time_to_plain": statistics.median(seconds) / statistics.median(totals["plain"]),
            "trial_tokens_per_token": made[name].trial_tokens / tokens if name in made else 0.0,
            "probes": made[name].probes if name in made else 0,
        }
        for name, seconds in totals.items()
    ]


def hint(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Greedy and of one length; a sentence ends with each "9"."""
    question = Question(0, tokenizer, options.steps)
    size = question.columns
    tokens = options.steps * task.TOKENS_PER_STEP
    given = {"hint": "from sum", "alpha": min(16, tokens // 4), "longest": 64, "ends": ("9",)}
    fixed = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    found: dict[str, list[tuple[float, int]]] = {}
    with kvcomp.patch(model, kvcomp.Full()):
        for _ in range(3):
            for name in ("plain", "end", "rewind"):
                more: dict[str, Any] = {}
                if name != "plain":
                    made = thinking.ConciseHint(tokenizer, size, place=name, **given)
                    rewinds = name == "rewind"
                    more = {"custom_generate": made} if rewinds else {"logits_processor": [made]}
                call = partial(model.generate, **question.inputs, **fixed, **more)
                out, seconds = timed(call)
                hints = tokenizer.decode(out[0, size:]).count("from sum")
                found.setdefault(name, []).append((seconds, hints))
    plain = statistics.median(seconds for seconds, _ in found["plain"])
    return [
        {
            "part": "hint",
            "contender": name,
            "time_to_plain": statistics.median(seconds for seconds, _ in runs) / plain,
            "hints": runs[0][1],
        }
        for name, runs in found.items()
    ]


def stop(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Mean tokens of thoughts whose end is EOS, by bias; and the range of those in a budget."""
    question = Question(0, tokenizer, options.steps)
    most = options.steps * task.TOKENS_PER_STEP
    cases: dict[str, list[Any]] = {
        f"bias {bias}": [
            thinking.StopScale(tokenizer, question.columns, bias=float(bias), end="<eos>")
        ]
        for bias in (0, 5, 10, 15, 20)
    }
    low, high = most // 4, most // 2
    cases[f"budget {low}..{high}"] = [
        *cases["bias 15"],
        thinking.BudgetForcing(
            tokenizer, question.columns, budget=high, minimum=low, wait="sum", end="<eos>"
        ),
    ]
    found = []
    with kvcomp.patch(model, kvcomp.Full()) as run:
        for name, chosen in cases.items():
            sampling = thinking.Sampling(**WARM, max_new_tokens=most)
            rows = thinking.Rows(
                run, question.inputs, sampling, copies=options.rows, processors=chosen
            )
            rows.finish()
            lengths = [len(row.ids) - row.ended for row in rows.all]
            row = {"part": "stop", "contender": name, "mean": statistics.mean(lengths)}
            found.append(row | {"shortest": min(lengths), "longest": max(lengths)})
    return found


def rounds(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Drafts of a quarter of the tokens of one long row."""
    question = Question(0, tokenizer, options.steps)
    most = options.steps * task.TOKENS_PER_STEP
    short = {"workspace": most // 8, "again": "{question} {carry}"}
    calls: dict[str, Callable[[Any], Any]] = {
        "pdr 8, 4, 1": lambda ask: thinking.pdr(
            ask, question.problem.prompt, drafts=(8, 4, 1), writer="top", **short
        ),
        "sr 3": lambda ask: thinking.sr(ask, question.problem.prompt, rounds=3, **short),
    }
    found = []
    for name in ("one row", *calls):
        with kvcomp.patch(model, kvcomp.Full()) as run:
            tokens = most if name == "one row" else most // 4
            ask = thinking.Ask(run, tokenizer, max_new_tokens=tokens, **WARM)
            if name == "one row":
                (reply,) = ask([question.problem.prompt])
                path = total = reply.prompt_tokens + reply.tokens
            else:
                result = calls[name](ask)
                path, total = result.sequential_tokens, result.total_tokens
            held = run.report().kv_bytes_peak
        found.append(
            {"part": "rounds", "contender": name, "path": path, "tokens": total, "kv_bytes": held}
        )
    return found


PARTS = {
    "votes": votes,
    "signals": signals,
    "cgrs": cgrs,
    "hint": hint,
    "stop": stop,
    "rounds": rounds,
    "follow": follow,
    "stand": stand,
    "drafted": drafted,
    "chunks": chunks,
    "packed": packed,
}


def line(row: Row) -> str:
    shown = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("part", "contender")
    )
    return f"{row['part']:8} {row['contender']:24} {'  '.join(shown)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    add("--problems", type=int, default=12, metavar="N")
    add("--rows", type=int, default=8, metavar="K", help="of one problem")
    add("--steps", type=int, default=40, metavar="N", help="of a walk, at most; four tokens each")
    add("--at", type=int, default=40, metavar="N", help="tokens at which trajectories are ranked")
    add("--text", metavar="MODEL", help="one that writes prose, such as smollm2-135m")
    options_of_stand(add)
    add("--new", type=int, default=256, metavar="N", help="stand, prose: tokens of a row")
    add("--rounds", type=int, default=3, metavar="N", help="of timed contenders in turn")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE")
    add("--smoke", action="store_true", help="one problem, few rows, short walks")
    options = parser.parse_args(argv)
    if options.smoke:
        options.problems, options.rows, options.steps, options.at = 1, 4, 8, 16
        options.contexts, options.new, options.rounds, options.walks = [128], 24, 1, [1]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(reasoner.path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    given = {name: getattr(options, name) for name in ("problems", "rows", "steps", "at")}
    facts = meta("thinking", "cpu", sampling=WARM, **given)
    print(header(facts), flush=True)
    rows: list[Row] = []
    for part in options.part:
        if options.text and part in PROSE:
            found = PROSE[part](options)
        else:
            found = PARTS[part](model, tokenizer, options)
        for row in found:
            print(line(row), flush=True)
            rows.append(row)
    if options.json:
        write_json(options.json, facts, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
