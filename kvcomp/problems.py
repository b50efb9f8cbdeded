"""Problems: an id, and a prompt as token ids; JSONL files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PROMPTS = ("prompt", "messages", "ids")


class Problem(NamedTuple):
    id: str
    ids: list[int]


def read_problems(file: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of problems, one object per line; see `prepare` for their keys.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object.
    """
    return [problem for _, problem in read_lines(file)]


def read_lines(file: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the numbers of their lines; empty lines are skipped."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")  # not at U+2028 in a text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"kvcomp: cannot read problems: {error}") from error
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"kvcomp: {file}, line {number}: {error}") from error
        if not isinstance(problem, dict):
            raise ValueError(f"kvcomp: {file}, line {number}: expected an object")
        problems.append((number, problem))
    return problems


def prepare(problems: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[Problem]:
    """Check `problems` and encode their prompts.

    Args:
        problems: mappings with an "id", and a "prompt" (text), "messages" (for the tokenizer's chat
            template) or "ids" (token ids).

    Raises:
        ValueError: a problem without an id or a usable prompt, two with one id, or no problem.
    """
    found: dict[str, Problem] = {}
    for place, problem in enumerate(problems):
        if not isinstance(problem, Mapping):
            _wrong(f"number {place}", "a mapping with an id and a prompt", problem)
        name = problem.get("id")
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            _wrong(f"number {place}: id", "a string or a number", name)
        name = str(name)
        if name in found:
            raise ValueError(f"kvcomp: problems: the id {name!r} occurs twice")
        found[name] = Problem(name, _encode(name, problem, tokenizer))
    if not found:
        raise ValueError("kvcomp: problems: expected at least one, got none")
    return list(found.values())


def _encode(name: str, problem: Mapping[str, Any], tokenizer: Any) -> list[int]:
    kinds = [kind for kind in PROMPTS if problem.get(kind) is not None]
    if len(kinds) != 1:
        _wrong(repr(name), f"one of {', '.join(PROMPTS)}", kinds or None)
    kind, value = kinds[0], problem[kinds[0]]
    if kind != "ids" and tokenizer is None:
        raise ValueError(f"kvcomp: tokenizer: expected one, as problem {name!r} is text, got None")
    if kind == "prompt":
        if not is_text(value) or not value:
            _wrong(f"{name!r}: prompt", "some text", value)
        return list(tokenizer(value)["input_ids"])
    if kind == "messages":
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"kvcomp: problem {name!r}: messages: expected a tokenizer with a chat template"
            )
        if not is_messages(value):
            _wrong(f"{name!r}: messages", "a list of objects with a role and a content", value)
        try:
            text = tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's, which may raise any
            raise ValueError(
                f"kvcomp: problem {name!r}: messages: refused by the chat template:"
                f" {' '.join(str(error).split())}"
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not is_token_ids(value) or not value:
        _wrong(f"{name!r}: ids", "a list of token ids", value)
    return list(value)


def is_text(value: Any) -> bool:
    """Whether it is a string of valid Unicode; JSON can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def is_messages(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(each, Mapping) and is_text(each.get("role")) and "content" in each
            for each in value
        )
    )


def is_token_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(i) is int and i >= 0 for i in value)


def _wrong(where: str, expected: str, got: Any) -> None:
    raise ValueError(f"kvcomp: problem {where}: expected {expected}, got {str(got)[:80]!r}")
