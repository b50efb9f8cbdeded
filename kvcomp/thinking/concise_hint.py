"""ConciseHint (arXiv 2506.18810): short hints inside a thought, the longer it is, the rarer.

A hint is due tau = min(alpha + beta * l, longest) tokens behind the last one, where l counts all
tokens up to there. The released code puts it back into the text that is there already and encodes
everything anew; here it comes at the next end of a sentence, so that nothing is encoded again, and
any method works. A hint's tokens are decoded like all others: each
costs a step, and may be evicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvcomp.thinking.checks import is_count, is_number, require, require_texts
from kvcomp.thinking.words import ends_with, tokens_of

ENDS = (".", "?", "!", "\n")
HINT = " (Make the answer concise!) "


class ConciseHint(LogitsProcessor):
    """Hints as tokens that are forced while a model decodes.

    Args:
        prompt: columns of the prompt, padding included.
        hint: its text.
        alpha, beta, longest: of the interval, in tokens; the paper's 128, 0.2 and its code's 1024.
        ends: texts behind which a hint may stand.

    Raises:
        ValueError: a value out of range, or a hint that the model does not know.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: int,
        *,
        hint: str = HINT,
        alpha: int = 128,
        beta: float = 0.2,
        longest: int = 1024,
        ends: tuple[str, ...] = ENDS,
    ) -> None:
        require(is_count(prompt), "ConciseHint: prompt", "its length in tokens", prompt)
        require(is_count(alpha, 1), "ConciseHint: alpha", "tokens, at least 1", alpha)
        require(is_number(beta) and beta >= 0, "ConciseHint: beta", "a number, at least 0", beta)
        require(
            is_count(longest, alpha), "ConciseHint: longest", f"at least alpha={alpha}", longest
        )
        require_texts(ends, "ConciseHint: ends")
        self.hint = tokens_of(tokenizer, hint, "hint", "ConciseHint")
        self.tokenizer, self.prompt, self.ends = tokenizer, prompt, ends
        self.alpha, self.beta, self.longest = alpha, beta, longest

    def interval(self, length: int) -> int:
        """Tokens from a hint, or from the prompt, to the next hint, behind `length` tokens."""
        return int(min(self.alpha + self.beta * length, self.longest))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        columns = input_ids.shape[1]
        if columns < self.prompt + self.alpha:
            return scores
        last = self._last(input_ids)
        due = [columns >= end + self.interval(end) for end in last]
        if not any(due):
            return scores
        ended = ends_with(self.tokenizer, input_ids, self.ends)
        scores = scores.clone()
        for row, is_due in enumerate(due):
            token = self._next(input_ids[row].tolist(), last[row], ended[row]) if is_due else None
            if token is not None:
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores

    def _last(self, ids: Tensor) -> list[int]:
        """The column behind the last whole hint of each row, or behind the prompt."""
        size = len(self.hint)
        output = ids[:, self.prompt :]
        if output.shape[1] < size:
            return [self.prompt] * len(ids)
        wanted = torch.tensor(self.hint, device=ids.device)
        found = (output.unfold(1, size, 1) == wanted).all(2)
        places = torch.arange(1, found.shape[1] + 1, device=ids.device)
        first = (found * places).amax(1)  # 1-based; 0: no hint
        return [self.prompt + (x - 1 + size if x else 0) for x in first.tolist()]

    def _next(self, ids: list[int], last: int, ended: bool) -> int | None:
        """The token of a hint that comes now, if one does: the rest of a hint that has begun behind
        an end, or the first token of one."""
        for begun in range(min(len(self.hint) - 1, len(ids) - last), 0, -1):
            start = len(ids) - begun
            if ids[start:] == self.hint[:begun] and start >= last + self.interval(last):
                before = torch.tensor([ids[:start]])
                if ends_with(self.tokenizer, before, self.ends)[0]:
                    return self.hint[begun]
        return self.hint[0] if ended else None
