"""DSER (arXiv 2510.17498): verify and refine a solution again and again, in many chains, and vote.

A chain carries the solution only, so its right and wrong states form a Markov chain, and the share
of right ones tends to p_IC / (p_IC + p_CI), whatever it began with: a vote is right once a wrong
solution is repaired more often than a right one is spoilt. That holds only if every solution is
refined, whatever the verdict says, and so it is. Chains and iterations are not given in what was at
hand of the paper; that the last ten iterations vote is.
"""

from __future__ import annotations

from kvcomp.thinking.ask import AskFunction
from kvcomp.thinking.checks import is_count, require, require_fields
from kvcomp.thinking.votes import AnswerOf, Result, boxed, vote

FIRST = "{question}"
VERIFY = (
    "Problem:\n{question}\n\nSolution:\n{solution}\n\nCheck the solution step by step. Name every"
    " mistake, and say whether the answer is right."
)
REFINE = (
    "Problem:\n{question}\n\nSolution:\n{solution}\n\nReview:\n{verdict}\n\nWrite a better solution"
    " in the light of the review, and give the final answer in \\boxed{{}}."
)


def dser(
    ask: AskFunction,
    question: str,
    *,
    chains: int = 8,
    iterations: int = 20,
    last: int = 10,
    answer_of: AnswerOf = boxed,
    first: str = FIRST,
    verify: str = VERIFY,
    refine: str = REFINE,
) -> Result:
    """Refine `chains` solutions side by side, and vote over the last iterations of all.

    Args:
        ask: an `Ask`, or any function from prompts to replies.
        iterations: of verifying and refining, two calls each.
        last: iterations that vote.
        first, verify, refine: prompts with {question}, {solution} and {verdict}.

    Returns:
        the majority; `lengths` are those of the solutions that voted.

    Raises:
        ValueError: a value out of range, or a prompt without its fields, or with others.
    """
    require(is_count(chains, 1), "dser: chains", "at least 1", chains)
    require(is_count(iterations, 1), "dser: iterations", "at least 1", iterations)
    require(is_count(last, 1) and last <= iterations, "dser: last", f"in 1..{iterations}", last)
    needed = {"first": "question", "verify": "question solution"}
    for name, prompt in {"first": first, "verify": verify, "refine": refine}.items():
        fields = needed.get(name, "question solution verdict").split()
        require_fields(prompt, fields, f"dser: {name}")
    result = Result("", None, {})
    replies = list(ask([first.format(question=question)] * chains))
    result.add(replies)
    solutions = [reply.solution for reply in replies]
    voters = []
    for iteration in range(iterations):
        asked = [verify.format(question=question, solution=each) for each in solutions]
        verdicts = list(ask(asked))
        result.add(verdicts)
        pairs = zip(solutions, verdicts, strict=True)
        asked = [
            refine.format(question=question, solution=each, verdict=verdict.solution)
            for each, verdict in pairs
        ]
        replies = list(ask(asked))
        result.add(replies)
        solutions = [reply.solution for reply in replies]
        if iteration >= iterations - last:
            voters += replies
    lengths = [reply.tokens for reply in voters]
    answers = [answer_of(reply.text) for reply in voters]
    best, result.votes = vote(answers, lengths)
    result.text, result.answer, result.lengths = voters[best].text, answers[best], lengths
    return result
