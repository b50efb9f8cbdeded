"""Many problems, one after another, with a log from which a run resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kvcomp.hf.positions import fitting
from kvcomp.hf.run import Run
from kvcomp.journal import Journal, require_field, require_keys
from kvcomp.problems import prepare
from kvcomp.progress import progress_bar
from kvcomp.thinking.checks import is_count, require
from kvcomp.thinking.rows import Sampling
from kvcomp.thinking.strategies import STRATEGIES, Chosen
from kvcomp.thinking.votes import AnswerOf, Result, boxed

FIELDS = [field.name for field in dataclasses.fields(Result)]


class Log(Journal):
    """A journal with a line per problem that is done.

    Attributes:
        done: id -> hash of the prompt, and what was found.
    """

    key = "kvcomp.thinking"
    kind = "a log of kvcomp think"

    def __init__(self, path: str | Path) -> None:
        self.done: dict[str, tuple[str, Result]] = {}
        super().__init__(path)

    def take_first(self, line: Any) -> None:
        self.settings = self.read_first(line)

    def take(self, line: Any) -> None:
        require_keys(line, ("id", "hash", *FIELDS))
        for name in ("id", "hash", "text"):
            require_field(isinstance(line[name], str), name, "text", line[name])
        require_field(line["id"] not in self.done, "id", "each problem once", line["id"])
        answer, votes, lengths = (line[name] for name in ("answer", "votes", "lengths"))
        require_field(isinstance(answer, str | None), "answer", "text or null", answer)
        for name in ("sequential_tokens", "total_tokens", "steps", "finished", "rows"):
            require_field(is_count(line[name]), name, "a number of at least 0", line[name])
        good = isinstance(votes, dict) and all(map(is_count, votes.values()))
        require_field(good, "votes", "numbers of at least 0", votes)
        good = isinstance(lengths, list) and all(map(is_count, lengths))
        require_field(good, "lengths", "a list of numbers of at least 0", lengths)
        found = Result(**{name: line[name] for name in FIELDS})
        self.done[line["id"]] = line["hash"], found

    def append(self, name: str, prompt: str, found: Result) -> None:
        self.write({"id": name, "hash": prompt, **dataclasses.asdict(found)})
        self.done[name] = prompt, found


def think(
    run: Run,
    tokenizer: Any,
    problems: Iterable[Mapping[str, Any]],
    chosen: Chosen,
    *,
    log: str | Path,
    settings: Mapping[str, Any] | None = None,
    answer_of: AnswerOf = boxed,
    progress: bool = False,
    **sampling: Any,
) -> dict[str, Result]:
    """Answer all problems by some strategies; what is in the log already is taken from there.

    Args:
        problems: as for `kvcomp.problems.prepare`; a "prompt" is used as it is, "messages" go
            through the chat template.
        log: JSONL file, with a line as soon as a problem is done: whole however the run ends.
        settings: more to write into the log, which a later run must have too.
        sampling: fields of `Sampling`.

    Returns:
        results by id, in the order of the problems.

    Raises:
        ValueError: bad input, a damaged log, or the log of another run; nothing was decoded.
    """
    wanted = list(problems)
    todo = prepare(wanted, tokenizer)
    kind = STRATEGIES[chosen.leading].kind if chosen.leading else "rows"
    words = run.model.get_input_embeddings().num_embeddings
    for problem in todo:
        require(
            bool(problem.ids) and max(problem.ids) < words,
            f"problem {problem.id!r}",
            f"at least one token, and ids below the {words} of the model",
            max(problem.ids, default="none"),
        )
    questions = {str(each["id"]): _question(each) for each in wanted}
    for name, (question, _) in questions.items():
        require(
            kind != "rounds" or question is not None,
            f"problem {name!r}",
            "a prompt, or one message of the user, as the strategy asks in rounds",
            "something else",
        )
    drawn = Sampling(**sampling)
    for problem in todo:
        where = f"problem {problem.id!r}"
        chosen.require_room(
            fitting(
                run.model.config,
                run.method,
                len(problem.ids),
                drawn.max_new_tokens,
                f"kvcomp.thinking: {where}",
            ),
            where,
        )
    chosen.made(run, tokenizer, 0, "processor")  # what is wrong with them is said before the log
    given = {
        "strategies": list(chosen.names),
        "options": {name: dict(each) for name, each in chosen.options.items()},
        "method": repr(run.method),
        **({} if run.eight_bits is None else {"kv": repr(run.eight_bits)}),
        **dataclasses.asdict(drawn),
        **(settings or {}),
    }
    with Log(log) as book, progress_bar(len(todo), progress, "problems") as tell:
        if book.settings is not None:
            book.begin(given)
        prompts = {problem.id: _hash(problem.ids) for problem in todo}
        for name, prompt in prompts.items():
            known = book.done[name][0] if name in book.done else prompt
            require(known == prompt, f"problem {name!r}", f"the prompt it has in {log}", "another")
        for problem in todo:
            if problem.id not in book.done:
                question, chat = questions[problem.id]
                found = chosen.drive(
                    run,
                    tokenizer,
                    {"input_ids": torch.tensor([problem.ids])},
                    question,
                    chat=chat,
                    answer_of=answer_of,
                    **dataclasses.asdict(drawn),
                )
                book.begin(given)  # only now, as a strategy that refuses its options begins no log
                book.append(problem.id, prompts[problem.id], found)
            tell(book.done[problem.id][1].total_tokens, True)
        return {problem.id: book.done[problem.id][1] for problem in todo}


def _question(problem: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The text of a problem, if it is one question, and whether it goes into the chat template."""
    if problem.get("prompt") is not None:
        return problem["prompt"], False
    messages = problem.get("messages") or []
    one = len(messages) == 1 and isinstance(messages[0]["content"], str)
    return (messages[0]["content"] if one else None), True


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
