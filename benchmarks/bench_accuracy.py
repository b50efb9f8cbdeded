"""What eviction and retrieval cost in accuracy, on the bundled reasoner, at equal bytes.

    python benchmarks/bench_accuracy.py --json accuracy.json      # about a quarter of an hour
    python benchmarks/bench_accuracy.py --part half --problems 16
    python benchmarks/bench_accuracy.py --smoke                   # a few seconds, for CI
    python benchmarks/bench_accuracy.py --method delethink --budgets 2048 8192

With --method delethink this is `bench_delethink.py --part scaling`, with its options. Without,
every eviction method gets the same bound, budget + window tokens a layer, and the same windows, so
that lag and score can be told apart; every retrieval method gets the same number of tokens on the
device. Four parts:

half    Walks over 16 nodes, decoded freely, at half of the full cache's peak, with evictions every
        128 steps.
tight   Walks over 64 nodes of which 8 can be reached: the prompt is longer than the bound, and 7 of
        8 facts never matter. The right answer is given token by token and each prediction graded,
        so that one lost fact costs its own steps and no others. A sweep over the bound.
lag     The same at one bound: every score with evictions every 1, 16 and 64 steps.
link    A long prompt and a long answer, given token by token, a quarter of the final context on the
        device: what each retrieval method gets right, and the bytes it brings over the link.

alpha is chosen by `LazyEviction.calibrate` on other problems, and is RaaS's too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import bench_delethink
import kvcomp
from kvcomp import Method
from kvcomp.methods.eviction import Eviction
from kvcomp.reasoner import path, task
from kvcomp.testing.bench import meta, write_json

CALIBRATION_SEED = 1000  # no problem that is graded has such a seed


@dataclass(frozen=True)
class WithoutRecurs(kvcomp.LazyEviction):
    """The interval term alone."""

    def recurs(self, interval: Tensor) -> Tensor:
        return torch.zeros_like(interval)


@dataclass(frozen=True)
class Row:
    part: str
    method: str
    window: int
    bound: int  # budget + window, tokens a layer keeps at most once the prompt is within it
    bound_bytes: int  # of K and V, one sequence, all layers
    step_accuracy: float
    first_visit_accuracy: float | None
    kept_mean: float
    kept_peak: int
    tracking_bytes: int  # one sequence
    parameters: str
    retrieval_rate: float = 0.0  # selections per step and layer
    link_bytes: float = 0.0  # of K and V fetched from host memory, per token

    def line(self) -> str:
        first = (
            "   -  " if self.first_visit_accuracy is None else f"{self.first_visit_accuracy:6.1%}"
        )
        return (
            f"{self.part:5} {self.method:22} W={self.window:<4} bound {self.bound:4}"
            f"  {self.bound_bytes / 1024:6.0f} KiB  steps {self.step_accuracy:6.1%}  first {first}"
            f"  kept {self.kept_mean:5.0f} (peak {self.kept_peak})"
            + (f"  rate {self.retrieval_rate:6.1%}" if self.retrieval_rate else "")
            + (f"  link {self.link_bytes / 1024:6.0f} KiB/token" if self.link_bytes else "")
        )


# --- the family -----------------------------------------------------------------------------------


def family(alpha: float, prompt: int) -> dict[str, Callable[[int, int], Method]]:
    """By name, from bound and window to a method; `prompt` tokens decide who can pin them."""

    def lazy(cls: type) -> Callable[[int, int], Method]:
        return lambda bound, window: cls(budget=bound - window, window=window, alpha=alpha)

    def plain(cls: type, **fields: Any) -> Callable[[int, int], Method]:
        return lambda bound, window: cls(budget=bound - window, window=window, **fields)

    table = {
        "lazy-eviction": lazy(kvcomp.LazyEviction),
        "lazy without H2": lazy(WithoutRecurs),
        "raas, no pin": plain(kvcomp.RaaS, alpha=alpha, keep_prompt=False),
        "h2o": plain(kvcomp.H2O),
        "h2o, recent=window": lambda bound, window: kvcomp.H2O(
            budget=bound - window, window=window, recent=window
        ),
        "tova": plain(kvcomp.TOVA),
        "snapkv": plain(kvcomp.SnapKV),
        "r-kv": plain(kvcomp.RKV),
        "lagkv": lambda bound, window: kvcomp.LagKV(
            budget=bound - window, window=window, partition=bound // 8
        ),
        "streaming-llm": plain(kvcomp.StreamingLLM),
        "lm-infinite": plain(kvcomp.LMInfinite),
        "recency-window": plain(kvcomp.RecencyWindow),
        "random-eviction": lambda bound, window: kvcomp.RandomEviction(
            budget=bound - window, window=window, recent=max(window, 16)
        ),
    }

    def pinned(bound: int, window: int) -> Method | None:
        return (
            None
            if bound - window <= prompt + 16
            else kvcomp.RandomEviction(
                budget=bound - window, window=window, recent=16, keep_prompt=True
            )
        )

    def raas(bound: int, window: int) -> Method | None:
        return (
            None
            if bound - window <= prompt + 1
            else kvcomp.RaaS(budget=bound - window, window=window, alpha=alpha)
        )

    return table | {"random, prompt pinned": pinned, "raas": raas}


# The similarity of successive queries of the reasoner is about 0 at every step: it takes a high tau
# to retrieve at every fact.
TAUS = (-0.2, 0.0, 0.1, 0.2, 0.3, 0.5)


def retrieval_family(bound: int) -> dict[str, Method]:
    """With at most `bound` tokens on the device, in all layers but the first."""
    shares = {"sinks": 4, "local": bound // 6, "dense_layers": 1}
    segment = (4, 16)
    budget = bound - shares["sinks"] - shares["local"] - segment[1] - 1
    shares["budget"] = budget
    clusters = {**shares, "segment": segment, "cluster_size": 4}
    table: dict[str, Method] = {
        f"louis-kv, tau {tau}": kvcomp.LouisKV(**clusters, tau=tau) for tau in TAUS
    }
    table["per-token-retrieval"] = kvcomp.PerTokenRetrieval(**clusters, tau=TAUS[-1])
    for stride in (2, 4):
        table[f"stride-retrieval, {stride}"] = kvcomp.StrideRetrieval(
            **{**clusters, "budget": budget + segment[1] - stride}, stride=stride
        )
    table["cluster-kv"] = kvcomp.ClusterKV(
        **shares, cluster_size=8, output_window=16, output_cluster=4
    )
    for page in (4, 16):
        pages = {**shares, "budget": budget + segment[1] - page, "page_size": page}
        table[f"quest, pages of {page}"] = kvcomp.Quest(**pages)
        table[f"arkvale, pages of {page}"] = kvcomp.ArkVale(**pages)
        table[f"free-kv, pages of {page}"] = kvcomp.FreeKV(**pages)
    tokens = {"budget": bound, "selecting": (2,)}
    table["tidal-decode"] = kvcomp.TidalDecode(**tokens)
    table["less-is-more"] = kvcomp.LessIsMore(**tokens, recent=bound // 4)
    table["recency-window"] = kvcomp.RecencyWindow(budget=bound - 16, window=16)
    return table


# --- the reasoner ---------------------------------------------------------------------------------


class Reasoner:
    """The model, and what it makes of problems under a method."""

    def __init__(self, device: str) -> None:
        logging.disable_progress_bar()
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path())
        self.model = AutoModelForCausalLM.from_pretrained(path()).float().to(device).eval()

    def token_bytes(self) -> int:
        """Of K and V of one token, all layers."""
        config = self.model.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4

    def free(self, problems: list[task.Problem], method: Method) -> tuple[list[task.Grade], Any]:
        """Greedy decoding, graded step by step."""
        inputs = self._tokens([problem.prompt for problem in problems])
        with kvcomp.patch(self.model, method) as run:
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=problems[0].steps * task.TOKENS_PER_STEP,
            )
        answers = out[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        grades = [task.grade(p, text) for p, text in zip(problems, texts, strict=True)]
        return grades, run.report()

    @torch.no_grad()
    def forced(self, problems: list[task.Problem], method: Method) -> tuple[list[task.Grade], Any]:
        """The right answers, token by token; a step is right if each of its tokens is foreseen."""
        inputs = self._tokens([problem.prompt for problem in problems])
        assert bool(inputs["attention_mask"].all()), "prompts of one length"
        gold = self._tokens([problem.gold() for problem in problems], special=False)["input_ids"]
        with kvcomp.patch(self.model, method) as run:
            cache = run.new_cache()
            foreseen = []
            fed = inputs["input_ids"]
            for column in range(gold.shape[1]):
                logits = self.model(fed, past_key_values=cache).logits[:, -1]
                foreseen.append(logits.argmax(-1))
                fed = gold[:, column : column + 1]
        right = (torch.stack(foreseen, 1) == gold).unflatten(1, (-1, task.TOKENS_PER_STEP)).all(-1)
        return [
            _graded(p, row) for p, row in zip(problems, right.tolist(), strict=True)
        ], run.report()

    def _tokens(self, texts: list[str], special: bool = True) -> Any:
        return self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=special
        ).to(self.device)


def _graded(problem: task.Problem, right: list[bool]) -> task.Grade:
    used: set[str] = set()
    firsts = []
    for (source, *_), ok in zip(problem.walk(), right, strict=True):
        if source not in used:
            firsts.append(ok)
        used.add(source)
    return task.Grade(mean(right), all(right), len(right), mean(firsts))


# --- the parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What is decoded, and what is swept. No bounds: half of the full context."""

    name: str
    nodes: int
    live: int | None
    steps: int
    forced: bool
    bounds: tuple[int, ...]
    windows: tuple[int, ...]  # none: retrieval, a quarter of the full context on the device

    def problems(self, count: int, first: int = 0) -> list[task.Problem]:
        seeds = range(first, first + count)
        return [task.make_problem(self.nodes, self.steps, seed, self.live) for seed in seeds]

    def rows(self, reasoner: Reasoner, count: int, alpha: float) -> Iterator[Row]:
        problems = self.problems(count)
        decode = reasoner.forced if self.forced else reasoner.free
        prompt = len(reasoner.tokenizer(problems[0].prompt)["input_ids"])
        context = prompt + self.steps * task.TOKENS_PER_STEP
        full = kvcomp.Full()
        yield _row(self.name, "full", full, context, decode(problems, full), reasoner)
        if not self.windows:
            for name, method in retrieval_family(context // 4).items():
                outcome = decode(problems, method)
                yield _row(self.name, name, method, context // 4, outcome, reasoner)
        for bound in self.bounds or (context // 2,):
            for window in self.windows:
                for name, make in family(alpha, prompt).items():
                    method = make(bound, window)
                    if method is not None:  # else its pinned prompt does not fit
                        outcome = decode(problems, method)
                        yield _row(self.name, name, method, bound, outcome, reasoner)


PARTS = (
    Part("half", 16, None, 256, False, (), (128,)),
    Part("tight", 64, 8, 128, True, (144, 160, 192, 256, 320), (64,)),
    Part("lag", 64, 8, 128, True, (192,), (1, 16, 64)),
    Part("link", 64, 16, 256, True, (), ()),
)
SMOKE = (
    Part("half", 4, None, 16, False, (), (8,)),
    Part("tight", 16, 4, 8, True, (64,), (8,)),
    Part("link", 32, 4, 8, True, (), ()),
)


def _row(
    part: str, name: str, method: Method, bound: int, outcome: tuple, reasoner: Reasoner
) -> Row:
    grades, report = outcome
    firsts = [g.first_visit_accuracy for g in grades if g.first_visit_accuracy is not None]
    return Row(
        part,
        name,
        method.window if isinstance(method, Eviction) else 0,
        bound,
        bound * reasoner.token_bytes(),
        mean(g.step_accuracy for g in grades),
        mean(firsts) if firsts else None,
        report.kept_mean,
        report.kept_peak,
        report.tracking_bytes_peak // len(grades),
        str(method),
        report.retrieval_rate,
        report.link_bytes_fetched / report.tokens_decoded,
    )


def calibrated(reasoner: Reasoner, part: Part) -> float:
    """alpha for the middle bound of a part, from two problems that are not graded."""
    bound = part.bounds[len(part.bounds) // 2]
    method = kvcomp.LazyEviction.calibrate(
        reasoner.model,
        [problem.prompt for problem in part.problems(2, CALIBRATION_SEED)],
        tokenizer=reasoner.tokenizer,
        max_new_tokens=part.steps * task.TOKENS_PER_STEP,
        budget=bound - part.windows[-1],
    )
    return method.alpha


def main(arguments: list[str] | None = None) -> int:
    study = argparse.ArgumentParser(add_help=False)
    study.add_argument("--method", choices=["delethink"], help="its own study, see the file")
    chosen, rest = study.parse_known_args(arguments)
    if chosen.method:
        return bench_delethink.main(["--part", "scaling", *rest])
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[study])
    parser.add_argument("--part", choices=names, nargs="+", default=names)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--alpha", type=float, help="default: calibrated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one small problem: for CI")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.problems, options.alpha = 1, options.alpha or 0.2
    if options.device == "cpu":
        torch.set_num_threads(1)  # so small a model gains nothing from more
    reasoner = Reasoner(options.device)
    alpha = options.alpha or calibrated(reasoner, next(p for p in PARTS if p.name == "lag"))
    print(f"alpha {alpha}, {options.problems} problems", flush=True)
    rows = []
    for part in SMOKE if options.smoke else PARTS:
        if part.name in options.part:
            for row in part.rows(reasoner, options.problems, alpha):
                print(row.line(), flush=True)
                rows.append(asdict(row))
    if options.json:
        facts = meta("accuracy", options.device, problems=options.problems, alpha=alpha)
        write_json(options.json, facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
