"""Answers of texts, and votes among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcomp.thinking.rows import Row, Rows

AnswerOf = Callable[[str], str | None]  # the answer in a text; None: it has none


@dataclass(frozen=True)
class Reply:
    """The answer to one prompt.

    Attributes:
        text: all of it.
        solution: what stands behind the thought; all of it where there is no thought.
        prompt_tokens, tokens: in and out.
    """

    text: str
    solution: str
    prompt_tokens: int
    tokens: int


@dataclass
class Result:
    """What a driver has found.

    Attributes:
        text: the chosen output.
        answer: of that text; None where no row has one.
        votes: answer -> rows, or drafts, that gave it.
        lengths: tokens of each row that voted, in the order in which they were decoded.
        sequential_tokens: in and out on the path that led to the answer (its latency).
        total_tokens: in and out of everything.
        steps: decode steps of a batch.
        finished: rows that came to their end, of `rows`.
        rows: rows that were decoded.
    """

    text: str
    answer: str | None
    votes: dict[str, int]
    lengths: list[int] = field(default_factory=list)
    sequential_tokens: int = 0
    total_tokens: int = 0
    steps: int = 0
    finished: int = 0
    rows: int = 0

    def add(self, replies: Sequence[Reply]) -> None:
        """Count one call: its longest reply is on the path, all are in the total."""
        both = [reply.prompt_tokens + reply.tokens for reply in replies]
        self.sequential_tokens += max(both)
        self.total_tokens += sum(both)
        self.lengths += [reply.tokens for reply in replies]
        self.rows += len(replies)


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, without outer blanks; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 1, start + len("\\boxed{")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[first:place].strip()
    return None


def vote(answers: Sequence[str | None], lengths: Sequence[int]) -> tuple[int, dict[str, int]]:
    """The majority among answers; a tie goes to the answer of the shortest row.

    Returns:
        index of the shortest row that gave the answer, or of the shortest row where none has an
        answer; and how often each answer was given, the most frequent first.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    order = sorted(range(len(answers)), key=lambda row: lengths[row])
    given = [0 if answer is None else counts[answer] for answer in answers]
    first = max(order, key=lambda row: given[row])
    return first, dict(counts.most_common())


def settle(
    rows: Rows, voters: Sequence[Row], lengths: dict[int, int], tokenizer: Any, answer_of: AnswerOf
) -> Result:
    """The result of a vote of some rows; where none has a vote, an empty one."""
    texts = [tokenizer.decode(row.ids, skip_special_tokens=False) for row in voters]
    answers = [answer_of(text) for text in texts]
    known = [lengths[row.number] for row in voters]
    result = Result(
        text="",
        answer=None,
        votes={},
        lengths=known,
        sequential_tokens=rows.columns + max((len(row.ids) for row in rows.all), default=0),
        total_tokens=rows.columns + rows.tokens,
        steps=rows.steps,
        finished=len(lengths),
        rows=len(rows.all),
    )
    if voters:
        first, result.votes = vote(answers, known)
        result.text, result.answer = texts[first], answers[first]
    return result
