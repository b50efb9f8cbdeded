"""What the rows of a study say together: one line per method and bound, over seeds and batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from accuracy.intervals import bootstrap, wilson
from harness.store import Row

KEYS = ("method", "baseline", "bound", "bound_bytes", "published")  # what rows of a line share


@dataclass(frozen=True)
class Share:
    """A mean in 0..1 and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:6.1%} [{100 * self.low:5.1f}, {100 * self.high:5.1f}]"


@dataclass(frozen=True)
class Summary:
    """Of one method at one bound.

    Attributes:
        steps: None where the checker knows no steps.
        peak_bytes, host_bytes: the most of any row, a sequence.
        attended: tokens attended over those of dense attention.
        link_bytes: fetched and stored, per decoded token.
        published: accuracy in %, as the paper of a preset has it.
        reason: why there is nothing to tell; the other figures are then 0.
    """

    method: str
    baseline: bool
    bound: str
    bound_bytes: int | None
    published: str | None = None
    keeps_all: bool = False
    over: bool = False
    steps: Share | None = None
    first_visits: float | None = None
    answers: Share | None = None
    problems: int = 0
    peak_bytes: int = 0
    host_bytes: int = 0
    attended: float = 0.0
    link_bytes: float = 0.0
    generated: float = 0.0
    seconds: float = 0.0
    reason: str | None = None

    @property
    def score(self) -> Share | None:
        """What the charts show: steps where there are some, else answers."""
        return self.steps or self.answers

    def line(self, whole: int) -> str:
        """`whole`: bytes of a sequence that keeps all."""
        head = f"{self.method:20} {self.bound:>5}"
        if self.reason is not None:
            return f"{head}  {self.reason}"
        steps = f"  steps {self.steps}" if self.steps else ""
        note = " OVER" if self.over else " keeps all" if self.keeps_all else ""
        return (
            f"{head}{steps}  answers {self.answers}  peak {self.peak_bytes / 2**20:6.2f} MiB"
            f" {self.peak_bytes / whole:4.0%}{note}  attended {self.attended:4.0%}"
            + (f"  published {self.published}" if self.published else "")
            + (f"  link {self.link_bytes / 1024:.0f} KiB/token" if self.link_bytes else "")
        )


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """In the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["bound"]), []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(rows: Sequence[Row]) -> Summary:
    first, done = rows[0], [row for row in rows if row["reason"] is None]
    named = {key: first[key] for key in KEYS}
    if len(done) < len(rows):
        return Summary(**named, reason=next(r["reason"] for r in rows if r["reason"] is not None))
    right = [answer for row in done for answer in row["right"]]
    steps, firsts = _by_problem(done, "steps"), _by_problem(done, "first_visits")
    return Summary(
        **named,
        keeps_all=first["keeps_all"],
        over=any(row["over"] for row in done),
        steps=Share(mean(steps), *bootstrap(steps)) if steps else None,
        first_visits=mean(firsts) if firsts else None,
        answers=Share(mean(right), *wilson(sum(right), len(right))),
        problems=len(right),
        peak_bytes=max(row["peak_bytes"] for row in done),
        host_bytes=max(row["host_bytes"] for row in done),
        attended=mean(row["attended"] for row in done),
        link_bytes=mean(row["link_bytes"] for row in done),
        generated=mean(tokens for row in done for tokens in row["generated"]),
        seconds=sum(row["seconds"] for row in done),
    )


def _by_problem(rows: Sequence[Row], key: str) -> list[float]:
    """One value per problem: the mean over its samples."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in zip(row["problems"], row[key], strict=True):
            if value is not None:
                found.setdefault(name, []).append(value)
    return [mean(values) for values in found.values()]
