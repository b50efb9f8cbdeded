"""What is right: from the text that a model wrote after a prompt to a grade.

Every checker is called with a problem and the decoded continuation, takes any text, and raises
nothing because of it. Where a chain of thought ends with `</think>`, an answer is looked for behind
that, and in the thought only if there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation import equivalence
from evaluation.notation import asks_percent
from kvcomp.reasoner import task

if TYPE_CHECKING:
    from evaluation.problems import Problem

THOUGHT = "</think>"
LETTERS = "ABCDEFGHIJ"
_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_WRAPPED = re.compile(r"\s*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{|[($\[{*\s])*")
_LETTER = re.compile(r"([A-J])(?=$|[)}\].:*$])|([a-j])(?=[)}\].*$]*$)")
# "Answer: C", "the correct option is **(C)**". Bounded, as garbage may be long.
_SAID = re.compile(
    r"(?i:\b(?:answer|choice|option))[\s*_]{0,4}(?::|\bis\b)[\s*_:]{0,8}(?i:option|choice)?"
    r"[\s*$({\[\\]{0,8}(?:text\{|mathrm\{|mathbf\{)?\(?([A-J])(?![\w'])"
)


@dataclass(frozen=True)
class Grade:
    """Shares are in 0..1.

    Attributes:
        answer: what was taken for the answer; None: there was none, or there are steps.
        steps: share of right steps, of problems with steps.
        first_visit: the same over the steps whose fact was not used before.
    """

    correct: bool
    answer: str | None = None
    steps: float | None = None
    first_visit: float | None = None


Checker = Callable[["Problem", str], Grade]


def math(problem: Problem, text: str) -> Grade:
    """The last boxed answer, by value: 1/2 is 0.5, 033 is 33, a set has no order.

    `notation` says what percentages, intervals and mixed numbers are equal to.
    """
    equivalence.require()
    answer = after_thought(text, last_boxed)
    right = answer is not None and equivalence.equal(
        problem.answer, answer, percent=asks_percent(problem.question)
    )
    return Grade(right, answer)


def choice(problem: Problem, text: str) -> Grade:
    """The letter in the last box, or the last one in words: "Answer: C"."""
    answer = after_thought(text, lambda part: _letter(part, problem.choices))
    return Grade(answer == problem.answer, answer)


def exact(problem: Problem, text: str) -> Grade:
    """The last line that is not empty, letter for letter."""
    answer = after_thought(text, lambda part: part.strip().rpartition("\n")[2].strip() or None)
    return Grade(answer == problem.answer.strip(), answer)


def steps(problem: Problem, text: str) -> Grade:
    """A walk of the bundled reasoner, step by step; the answer says how many steps are asked for.

    Raises:
        ValueError: the problem is no switch walk.
    """
    found = task.grade(walk(problem), text)
    return Grade(
        found.final_correct, steps=found.step_accuracy, first_visit=found.first_visit_accuracy
    )


def concluded(checker: Checker) -> Checker:
    """Wrong unless the thinking came to its end, as Delethink's evaluation has it."""

    def check(problem: Problem, text: str) -> Grade:
        _, ended, answer = text.partition(THOUGHT)
        return checker(problem, answer) if ended else Grade(False)

    return check


CHECKERS: dict[str, Checker] = {
    "math": math,
    "choice": choice,
    "exact": exact,
    "steps": steps,
    "math-concluded": concluded(math),
    "choice-concluded": concluded(choice),
}


def require(name: str) -> None:
    """Raise ImportError if what a checker needs is not installed."""
    if name.startswith("math"):
        equivalence.require()


def after_thought(text: str, find: Callable[[str], str | None]) -> str | None:
    """What `find` finds behind the first end of a thought, else in all of `text`."""
    _, ended, answer = text.partition(THOUGHT)
    found = find(answer) if ended else None
    return find(text) if found is None else found


def last_boxed(text: str) -> str | None:
    r"""What is in the \boxed{...} that was opened last and is closed; None: no such, or empty."""
    found: tuple[int, int] = (-1, -1)
    opened: list[tuple[int, bool]] = []  # of each brace, where its content starts, and if boxed
    for match in _BRACES.finditer(text):
        sign = match[0]
        if sign == "{" or len(sign) > 2:
            opened.append((match.end(), sign != "{"))
        elif sign == "}" and opened:
            start, is_box = opened.pop()
            if is_box and start > found[0]:
                found = start, match.start()
    return text[slice(*found)].strip() or None if found[0] >= 0 else None


def _letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that is boxed, or whose choice is, or that is said last."""
    letters = LETTERS[: len(choices)] if choices else LETTERS
    if boxed := last_boxed(text):
        match = _LETTER.match(boxed, _WRAPPED.match(boxed).end())
        if match and (letter := (match[1] or match[2]).upper()) in letters:
            return letter
        same = [x for x in choices if "".join(x.split()) == "".join(boxed.split())]
        if len(same) == 1:
            return letters[choices.index(same[0])]
    said = [letter for letter in _SAID.findall(text) if letter in letters]
    return said[-1] if said else None


def walk(problem: Problem) -> task.Problem:
    """The problem of the reasoner that a prompt states."""
    words = (problem.prompt or "").split()
    facts, question = words[:-4], words[-4:]
    try:
        before, start, _, total = question
        if before != "from" or not facts or len(facts) % 3:
            raise ValueError
        edges = tuple((s, t, int(w)) for s, t, w in zip(*[iter(facts)] * 3, strict=True))
        asked = len(problem.answer.split()) // task.TOKENS_PER_STEP
        return task.Problem(len(edges) // 2, max(1, asked), edges, start, int(total))
    except ValueError:
        raise ValueError(
            f"kvcomp.accuracy: problem {problem.id!r}: the steps checker expects a switch walk, got"
            f" the prompt {str(problem.prompt)[:80]!r}"
        ) from None
