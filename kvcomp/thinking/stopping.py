"""Stop control: when a model may, shall and must end its thought.

`StopScale` makes the end of a thought likelier, as arXiv 2505.07961 (Thinking Scaling) does for
small reasoners that see the end among their first candidates and do not take it. The paper's
formula was not at hand; the rule here is our own. `BudgetForcing` is the one of s1 (arXiv
2501.19393, section 3.1): the end is forced at a budget, and replaced by "Wait" before a minimum.

Both are functions of the ids alone, so rows may be dropped, repeated and reordered, and a prefix
that is asked for twice gets the same answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvcomp.thinking.checks import is_count, is_number, require
from kvcomp.thinking.words import end_of_thinking, has, one_token


class _Thought(LogitsProcessor):
    """Acts on rows whose thought goes on: those without the end token behind the prompt."""

    def __init__(self, tokenizer: Any, prompt: int, end: str | None) -> None:
        self.caller = type(self).__name__
        require(is_count(prompt), f"{self.caller}: prompt", "its length in tokens", prompt)
        self.prompt = prompt
        self.end = end_of_thinking(tokenizer, end, caller=self.caller)

    def _thinking(self, ids: Tensor) -> Tensor:
        """[B, 1] bool."""
        return ~has(ids[:, self.prompt :], self.end)[:, None]

    def _length(self, ids: Tensor) -> int:
        """Tokens since the prompt."""
        require(
            ids.shape[1] >= self.prompt,
            f"{self.caller}: prompt",
            f"the length of the prompt that is decoded, at most {ids.shape[1]}",
            self.prompt,
        )
        return ids.shape[1] - self.prompt


class StopScale(_Thought):
    """Make the end of a thought likelier, or less likely.

    Args:
        prompt: columns of the prompt, padding included: `inputs["input_ids"].shape[1]`.
        bias: nats added to the logit of the end.
        scale: the logit of the end is multiplied by this where it is positive, and divided by it
            where it is negative, so that more than 1 always favours the end.
        minimum: tokens of thought before which nothing is changed.
        end: text of the token that ends a thought; None: the model's own tag.

    Raises:
        ValueError: a value out of range, or a model without such a token.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: int,
        *,
        bias: float = 0.0,
        scale: float = 1.0,
        minimum: int = 0,
        end: str | None = None,
    ) -> None:
        require(is_number(bias), "StopScale: bias", "a number", bias)
        require(is_number(scale) and scale > 0, "StopScale: scale", "a number above 0", scale)
        require(is_count(minimum), "StopScale: minimum", "tokens, at least 0", minimum)
        super().__init__(tokenizer, prompt, end)
        self.bias, self.scale, self.minimum = bias, scale, minimum

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._length(input_ids) < self.minimum:
            return scores
        logit = scores[:, self.end : self.end + 1]
        likelier = torch.where(logit > 0, logit * self.scale, logit / self.scale) + self.bias
        scores = scores.clone()
        scores[:, self.end : self.end + 1] = torch.where(self._thinking(input_ids), likelier, logit)
        return scores


class BudgetForcing(_Thought):
    """End every thought within [minimum, budget] tokens.

    Before the minimum, the probability of the end, and that of EOS, goes to `wait`: so greedy
    decoding and sampling both say "Wait" exactly where they would have ended.

    Args:
        prompt: columns of the prompt, padding included.
        budget: tokens of thought at which the end is forced; None: never.
        minimum: tokens of thought before which none ends.
        wait: text of the token that replaces the end; one token.
        end: as for `StopScale`.

    Raises:
        ValueError: a value out of range, or a model without such tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: int,
        *,
        budget: int | None = None,
        minimum: int = 0,
        wait: str = "Wait",
        end: str | None = None,
    ) -> None:
        require(
            budget is None or is_count(budget, 1),
            "BudgetForcing: budget",
            "tokens, at least 1, or None",
            budget,
        )
        require(is_count(minimum), "BudgetForcing: minimum", "tokens, at least 0", minimum)
        require(
            budget is None or minimum <= budget,
            "BudgetForcing: minimum",
            f"at most budget={budget}",
            minimum,
        )
        is_some = budget is not None or minimum > 0
        require(is_some, "BudgetForcing", "a budget or a minimum", "neither")
        super().__init__(tokenizer, prompt, end)
        self.budget, self.minimum = budget, minimum
        self.wait = one_token(tokenizer, wait, "wait", self.caller) if minimum else None
        eos = getattr(tokenizer, "eos_token_id", None)
        self.ends = [self.end] + [each for each in (eos,) if each not in (None, self.end)]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        length = self._length(input_ids)
        thinking = self._thinking(input_ids)
        if self.wait is not None and length < self.minimum:
            waits = scores.clone()
            moved = torch.cat([scores[:, self.ends], scores[:, [self.wait]]], 1)
            waits[:, self.ends] = float("-inf")
            # The mass is kept, and the larger logit too, so that a greedy end becomes a wait.
            waits[:, self.wait] = moved.logsumexp(1)
            return torch.where(thinking, waits, scores)
        if self.budget is not None and length >= self.budget:
            forced = torch.full_like(scores, float("-inf"))
            forced[:, self.end] = 0.0
            return torch.where(thinking, forced, scores)
        return scores
