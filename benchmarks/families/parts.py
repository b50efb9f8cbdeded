"""The parts of `bench_families.py`: what is decoded, and at which bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import kvcomp
from families.members import family, retrieval_family
from families.reasoner import Reasoner
from kvcomp import Method
from kvcomp.methods.eviction import Eviction
from kvcomp.reasoner import task

CALIBRATION_SEED = 1000  # no problem that is graded has such a seed


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
    Part("lag", 16, 4, 8, True, (64,), (1, 8)),
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
