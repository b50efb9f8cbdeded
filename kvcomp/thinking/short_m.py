"""short-m@k (arXiv 2505.17813): k thoughts at once; the m that end first answer and vote.

Short thoughts are right more often than long ones of the same question. All k rows are forked from
one encoded prompt. As soon as m of them have ended their thought, the others leave the batch and
its cache; the m go on to their answers. "First" is by tokens.
"""

from __future__ import annotations

from typing import Any

from kvcomp.hf.run import Run
from kvcomp.thinking.checks import is_count, require
from kvcomp.thinking.rows import Processors, Rows, Sampling
from kvcomp.thinking.votes import AnswerOf, Result, boxed, settle
from kvcomp.thinking.words import end_of_thinking


def short_m_at_k(
    run: Run,
    tokenizer: Any,
    inputs: Any,
    *,
    k: int = 8,
    m: int = 3,
    answer_of: AnswerOf = boxed,
    end: str | None = None,
    processors: Processors = (),
    **sampling: Any,
) -> Result:
    """Answer one prompt by the m shortest of k thoughts; m = k is plain majority voting.

    Args:
        run: of `kvcomp.patch`, with any method.
        inputs: of one prompt, as the tokenizer makes them: "input_ids" [1, n].
        answer_of: text -> its answer, by which rows are compared.
        end: text of the token that ends a thought; None: the model's own tag. A row that says EOS
            has ended it too; one that is cut off at `max_new_tokens` has not, and has no vote.
        processors: as for `Rows`.
        sampling: fields of `Sampling`.

    Returns:
        the answer that most of the m rows gave, a tie going to the shortest thought; `lengths` are
        those of their thoughts.

    Raises:
        ValueError: m is not in 1..k, several prompts, or a model that does not mark its thoughts.
    """
    require(is_count(k, 1), "short_m_at_k: k", "rows, at least 1", k)
    require(is_count(m, 1) and m <= k, "short_m_at_k: m", f"in 1..k={k}", m)
    require(len(inputs["input_ids"]) == 1, "short_m_at_k: inputs", "one prompt", "several")
    token = end_of_thinking(tokenizer, end, caller="short_m_at_k")
    rows = Rows(run, inputs, Sampling(**sampling), copies=k, processors=processors)
    thoughts: dict[int, int] = {}  # number -> tokens of the thought
    while rows.live and len(thoughts) < m:
        for row, newest in rows.step():
            if row.number not in thoughts and (newest == token or row.ended):
                thoughts[row.number] = len(row.ids)
    shortest = sorted(thoughts, key=lambda number: (thoughts[number], number))[:m]
    rows.keep([row for row in rows.live if row.number in shortest])
    rows.finish()
    return settle(rows, [rows.all[number] for number in shortest], thoughts, tokenizer, answer_of)


def majority(
    run: Run,
    tokenizer: Any,
    inputs: Any,
    *,
    k: int = 1,
    answer_of: AnswerOf = boxed,
    processors: Processors = (),
    **sampling: Any,
) -> Result:
    """Answer one prompt by the vote of k rows, all to their end: what `short_m_at_k` is compared
    with. Rows that were cut off vote only where none has ended. Arguments as there.

    Raises:
        ValueError: no row, or several prompts.
    """
    require(is_count(k, 1), "majority: k", "rows, at least 1", k)
    require(len(inputs["input_ids"]) == 1, "majority: inputs", "one prompt", "several")
    rows = Rows(run, inputs, Sampling(**sampling), copies=k, processors=processors)
    rows.finish()
    voters = [row for row in rows.all if row.ended] or rows.all
    lengths = {row.number: len(row.ids) for row in voters}
    result = settle(rows, voters, lengths, tokenizer, answer_of)
    result.finished = sum(row.ended for row in rows.all)
    return result
