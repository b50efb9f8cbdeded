"""Problems with answers: the JSONL of `kvcomp delethink`, and an answer a line.

A line is `{"id": 1, "messages": [...], "answer": "72"}`, or has a `"prompt"` (text) or `"ids"`
(token ids) in place of the messages; `"checker"` names how it is graded. Lines of public files have
a question in place of all three, and a template makes the message of it. Names of fields are read
without regard to capitals and with spaces for underscores.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.checkers import CHECKERS, LETTERS, last_boxed, require, walk

# Of each thing, the names that public files have for it; the first one there is taken.
FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id", "unique_id", "question_id", "record_id"),
    "question": ("problem", "question"),
    "answer": ("answer", "correct_answer", "expected_answer", "solution"),
    "choices": ("choices", "options"),
    "wrong": ("incorrect_answer_1", "incorrect_answer_2", "incorrect_answer_3"),
}
PROMPTS = ("messages", "prompt", "ids")
TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """One problem: exactly one of `messages`, `prompt` and `ids` is what the model is given.

    Attributes:
        answer: what is right, as text: a number or formula, the letter of a choice, the last line,
            or the walk of a reasoner's problem.
        checker: of `checkers.CHECKERS`.
        choices: texts, in the order of their letters.
    """

    id: str
    answer: str
    checker: str
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | None = None
    ids: tuple[int, ...] | None = None
    choices: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The text that the model is given; empty, where that is token ids."""
        contents = [message["content"] for message in self.messages or ()]
        return "\n".join([*contents, self.prompt or ""])

    def line(self) -> dict[str, Any]:
        """What `kvcomp delethink` reads: id and prompt."""
        given = {kind: getattr(self, kind) for kind in PROMPTS}
        return {"id": self.id} | {k: v for k, v in given.items() if v is not None}


def encode(problems: Iterable[Problem], tokenizer: Any) -> list[list[int]]:
    """The prompts as token ids, messages through the tokenizer's chat template.

    Raises:
        ValueError: messages without a chat template, or a prompt that is none.
    """
    from kvcomp.problems import prepare

    return [found.ids for found in prepare([problem.line() for problem in problems], tokenizer)]


def load(
    path: str | Path,
    *,
    checker: str = "math",
    template: str = TEMPLATE,
    fields: Mapping[str, Sequence[str]] = FIELDS,
    count: int | None = None,
) -> list[Problem]:
    """Read and check a file before anything is decoded.

    Args:
        checker: of lines that name none.
        template: of the message of lines with a question: `{question}`, and `{choices}`, one a
            line with its letter; all other braces stand for themselves.
        fields: the names of things, as in FIELDS.
        count: only the first so many.

    Raises:
        ValueError: a file or line that cannot be used; it says which line and field.
        ImportError: a checker needs a library that is not installed.
    """
    from kvcomp.problems import read_lines

    problems: dict[str, Problem] = {}
    for number, line in read_lines(path)[:count]:
        reader = _Line(f"{path}, line {number}", line, fields)
        problem = reader.problem(str(number), checker, template)
        if problem.id in problems:
            raise reader.wrong("id", "one that no line before has", problem.id)
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"kvcomp.accuracy: {path}: expected at least one problem, got none")
    for problem in problems.values():
        require(problem.checker)
        if problem.checker == "steps":
            walk(problem)
    return list(problems.values())


class _Line:
    """One object of a file, and where it is."""

    def __init__(self, where: str, line: Mapping[str, Any], fields: Mapping[str, Sequence[str]]):
        self.where, self.fields = where, fields
        self.values = {_folded(key): v for key, v in line.items() if v is not None}

    def problem(self, default_id: str, checker: str, template: str) -> Problem:
        name = self.get("id", default_id)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise self.wrong("id", "a string or a number", name)
        checker = self.values.get("checker", checker)
        if not isinstance(checker, str) or checker not in CHECKERS:
            raise self.wrong("checker", f"one of {', '.join(CHECKERS)}", checker)
        answer, choices = self.answer(str(name))
        given = [kind for kind in PROMPTS if kind in self.values]
        if len(given) > 1:
            raise self.wrong(given[1], f"{given[0]} or {given[1]}", "both")
        prompt = {given[0]: self.prompt(given[0])} if given else self.asked(template, choices)
        return Problem(str(name), answer, checker, choices=choices, **prompt)

    def prompt(self, kind: str) -> Any:
        value = self.values[kind]
        if kind == "prompt":
            if not isinstance(value, str) or not value:
                raise self.wrong(kind, "some text", value)
            return value
        is_part = _is_message if kind == "messages" else _is_token
        if not isinstance(value, list) or not value or not all(map(is_part, value)):
            parts = "messages with role and content" if kind == "messages" else "token ids"
            raise self.wrong(kind, f"a list of {parts}", value)
        return tuple(value)

    def asked(self, template: str, choices: Sequence[str]) -> dict[str, Any]:
        question = self.get("question")
        if question is None:
            names = ", ".join((*PROMPTS, *self.fields["question"]))
            raise self.wrong("prompt", f"one of {names}", sorted(self.values))
        if not isinstance(question, str) or not question.strip():
            raise self.wrong(self.name("question"), "some text", question)
        listed = "\n".join(f"{letter}) {x}" for letter, x in zip(LETTERS, choices, strict=False))
        # In one pass and not by format(): questions and templates are full of braces.
        head, mark, tail = template.partition("{question}")
        if not mark:
            raise ValueError(f"kvcomp.accuracy: template: expected {{question}}, got {template!r}")
        head, tail = (part.replace("{choices}", listed) for part in (head, tail))
        content = (head + question.strip() + tail).strip()
        return {"messages": ({"role": "user", "content": content},)}

    def answer(self, seed: str) -> tuple[str, tuple[str, ...]]:
        """The answer and the choices; of a line with choices the answer is a letter."""
        value = self.get("answer")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.wrong(self.name("answer"), "text or a number", value)
        wrong = [self.values[key] for key in self.fields.get("wrong", ()) if key in self.values]
        choices = self.get("choices", [value, *wrong] if wrong else [])
        texts = isinstance(choices, list) and all(isinstance(x, str) for x in choices)
        if not texts or len(choices) == 1 or len(choices) > len(LETTERS):
            raise self.wrong(self.name("choices"), f"2 to {len(LETTERS)} texts", choices)
        choices = [x.strip() for x in choices]
        if wrong:  # the right one would be first: an order that is the same in every run
            value = value.strip()
            random.Random(seed).shuffle(choices)
        if choices:
            return self.letter(value, choices), tuple(choices)
        answer = str(value).rpartition("####")[2].strip()  # GSM8K has the solution before it
        boxed = last_boxed(answer) if self.name("answer") == "solution" else None
        if not (answer := boxed or answer):
            raise self.wrong(self.name("answer"), "an answer", value)
        return answer, ()

    def letter(self, answer: str | int | float, choices: Sequence[str]) -> str:
        letters = LETTERS[: len(choices)]
        if isinstance(answer, int) and 0 <= answer < len(choices):
            return letters[answer]
        if isinstance(answer, str) and choices.count(answer.strip()) == 1:
            return letters[choices.index(answer.strip())]
        if isinstance(answer, str) and answer.strip() in set(letters):
            return answer.strip()
        expected = f"a letter of {letters}, a place from 0, or one of the choices"
        raise self.wrong(self.name("answer"), expected, answer)

    def get(self, thing: str, default: Any = None) -> Any:
        return self.values.get(self.name(thing), default)

    def name(self, thing: str) -> str:
        """The field that has it, or the first that could."""
        names = [_folded(name) for name in self.fields.get(thing, (thing,))]
        return next((name for name in names if name in self.values), names[0])

    def wrong(self, field: str, expected: str, got: Any) -> ValueError:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        return ValueError(
            f"kvcomp.accuracy: {self.where}: {field}: expected {expected}, got {shown}"
        )


def _folded(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0
