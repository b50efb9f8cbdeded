"""PDR and SR (arXiv 2510.01123): drafts in parallel, distilled into a small workspace, refined.

Round r asks for M_r drafts of the question and of the workspace that the drafts of the round before
were distilled into; the last round has one draft, the answer. The workspace is bounded and not
kept: what it drops is gone, as behind a chunk of Delethink. Sequential refinement (SR) is one draft
in each round, carried as it is.

The paper leaves open by what drafts are the best: here those come first whose answer most drafts
gave, the shorter before the longer. Thoughts are dropped, drafts enter as their solutions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kvcomp.thinking.ask import Ask, AskFunction
from kvcomp.thinking.checks import is_count, require, require_fields
from kvcomp.thinking.votes import AnswerOf, Reply, Result, boxed, vote

WRITERS = ("summary", "top", "random")
FIRST = "{question}"
AGAIN = (
    "{question}\n\nNotes from earlier attempts, which may be wrong:\n{carry}\n\nSolve the problem"
    " with their help, check what they claim, and give the final answer in \\boxed{{}}."
)
SUMMARY = (
    "Problem:\n{question}\n\nAttempts:\n{carry}\n\nSummarise them: where they agree and where they"
    " contradict each other, which facts they derived, what is still open, and what to try next."
)


def pdr(
    ask: AskFunction,
    question: str,
    *,
    drafts: tuple[int, ...] = (8, 4, 1),
    writer: str = "summary",
    keep: int = 2,
    workspace: int = 2048,
    answer_of: AnswerOf = boxed,
    first: str = FIRST,
    again: str = AGAIN,
    summary: str = SUMMARY,
    seed: int = 0,
) -> Result:
    """Draft in parallel, distil, refine.

    Args:
        ask: an `Ask`, or any function from prompts to replies.
        drafts: M_1..M_R; the last is 1.
        writer: "summary", written by the model; "top": the best `keep` drafts; "random": `keep`
            drafts, drawn anew for every next draft.
        workspace: tokens of the workspace, at most (words, where `ask` is not an `Ask`).
        first, again, summary: prompts with {question} and {carry}.
        seed: of "random".

    Returns:
        the last draft. `sequential_tokens` are in and out along one path, the longest draft of
        each round and what the writer took; `total_tokens` those of all calls.

    Raises:
        ValueError: a value out of range, or a prompt without its fields, or with others.
    """
    _check("pdr", workspace, first=first, again=again, summary=summary)
    require(
        len(drafts) > 0 and all(is_count(each, 1) for each in drafts) and drafts[-1] == 1,
        "pdr: drafts",
        "numbers of at least 1, the last 1",
        tuple(drafts),
    )
    require(writer in WRITERS, "pdr: writer", f"one of {', '.join(WRITERS)}", writer)
    require(is_count(keep, 1), "pdr: keep", "drafts, at least 1", keep)
    result = Result("", None, {})
    rng = random.Random(seed)
    carries: list[str] = []
    for count, following in zip(drafts, [*drafts[1:], 0], strict=True):
        prompts = [again.format(question=question, carry=carry) for carry in carries]
        replies = list(ask(prompts or [first.format(question=question)] * count))
        result.add(replies)
        if not following:
            break
        if writer == "summary":
            text = _joined([reply.solution for reply in replies])
            notes = list(ask([summary.format(question=question, carry=text)]))
            result.add(notes)
            carries = [_cut(ask, notes[0].solution, workspace)] * following
        elif writer == "top":
            best = _best(replies, answer_of)[:keep]
            carries = [_fit(ask, [each.solution for each in best], workspace)] * following
        else:
            drawn = (rng.sample(replies, min(keep, len(replies))) for _ in range(following))
            carries = [_fit(ask, [each.solution for each in some], workspace) for some in drawn]
    result.text, result.answer = replies[0].text, answer_of(replies[0].text)
    if result.answer is not None:
        result.votes = {result.answer: 1}
    return result


def sr(
    ask: AskFunction,
    question: str,
    *,
    rounds: int = 3,
    workspace: int = 2048,
    answer_of: AnswerOf = boxed,
    first: str = FIRST,
    again: str = AGAIN,
) -> Result:
    """Sequential refinement: `rounds` drafts one after another, each with the one before at hand.
    The other arguments are those of `pdr`."""
    _check("sr", workspace, first=first, again=again)
    require(is_count(rounds, 1), "sr: rounds", "at least 1", rounds)
    one: dict[str, Any] = {
        "drafts": (1,) * rounds,
        "writer": "top",
        "keep": 1,
        "workspace": workspace,
    }
    return pdr(ask, question, **one, answer_of=answer_of, first=first, again=again)


def _check(where: str, workspace: int, **prompts: str) -> None:
    require(is_count(workspace, 1), f"{where}: workspace", "tokens, at least 1", workspace)
    for name, prompt in prompts.items():
        needed = ["question"] if name == "first" else ["question", "carry"]
        require_fields(prompt, needed, f"{where}: {name}")


def _best(replies: Sequence[Reply], answer_of: AnswerOf) -> list[Reply]:
    answers = [answer_of(reply.text) for reply in replies]
    counts = vote(answers, [reply.tokens for reply in replies])[1]
    order = range(len(replies))
    return [
        replies[i]
        for i in sorted(order, key=lambda i: (-counts.get(answers[i] or "", 0), replies[i].tokens))
    ]


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(f"Attempt {number}:\n{text}" for number, text in enumerate(texts, 1))


def _fit(ask: AskFunction, texts: Sequence[str], tokens: int) -> str:
    """Several texts within so many tokens: each keeps its end, and has an equal share."""
    if len(texts) == 1:
        return _cut(ask, texts[0], tokens)
    share = max(tokens // len(texts), 1)
    return _joined([_cut(ask, text, share) for text in texts])


def _cut(ask: AskFunction, text: str, tokens: int) -> str:
    if isinstance(ask, Ask):
        return ask.cut(text, tokens)
    return " ".join(text.split(" ")[-tokens:])
