"""ConciseHint (arXiv 2506.18810): short hints inside a thought, the longer it is, the rarer.

A hint is due tau = min(alpha + beta * l, longest) tokens behind the last one, where l counts all
tokens up to there. There are two places for it:

    end     the next end of a sentence. Nothing is encoded again, and any method works. The hint's
            tokens are decoded like all others: each costs a step, and may be evicted.
    rewind  back in the interval, as in the released code: behind the first mark from a certain
            share of its text on. The text behind the mark is kept behind the hint. Both are encoded
            anew, so the method must be able to take tokens back.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvcomp.thinking.checks import is_count, is_number, require, require_texts
from kvcomp.thinking.custom_loop import refuse_others
from kvcomp.thinking.words import ends_with, tokens_of

ENDS = (".", "?", "!", "\n")
MARKS = (". ", ", ")  # for "rewind"
LATEST = 0.8  # share of the text of an interval behind which the search for a mark begins, at most
HINT = " (Make the answer concise!) "


class ConciseHint(LogitsProcessor):
    """Hints inside what a model writes.

        model.generate(**inputs, logits_processor=[ConciseHint(tokenizer, columns)])
        model.generate(**inputs, custom_generate=ConciseHint(tokenizer, columns, place="rewind"))

    Args:
        prompt: columns of the prompt, padding included.
        place: "end" makes a logits processor, which forces the tokens of a hint. "rewind" makes a
            `custom_generate` for one row under `kvcomp.patch`.
        hint: its text.
        alpha, beta, longest: of the interval, in tokens; the paper's 128, 0.2 and its code's 1024.
        ends: texts behind which a hint may stand; None: `ENDS`, or `MARKS` for "rewind", where it
            stands before the blank.

    Raises:
        ValueError: a value out of range, or a hint that the model does not know.
    """

    def __new__(cls, *args: Any, place: str = "end", **options: Any) -> Self:
        known = ("end", "rewind")
        require(place in known, "ConciseHint: place", " or ".join(map(repr, known)), place)
        kind: Any = _Rewinding if place == "rewind" else cls
        return super().__new__(kind)

    def __init__(
        self,
        tokenizer: Any,
        prompt: int,
        *,
        place: str = "end",
        hint: str = HINT,
        alpha: int = 128,
        beta: float = 0.2,
        longest: int = 1024,
        ends: tuple[str, ...] | None = None,
    ) -> None:
        require(is_count(prompt), "ConciseHint: prompt", "its length in tokens", prompt)
        require(is_count(alpha, 1), "ConciseHint: alpha", "tokens, at least 1", alpha)
        require(is_number(beta) and beta >= 0, "ConciseHint: beta", "a number, at least 0", beta)
        require(
            is_count(longest, alpha), "ConciseHint: longest", f"at least alpha={alpha}", longest
        )
        ends = (MARKS if place == "rewind" else ENDS) if ends is None else ends
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


class _Rewinding(ConciseHint):
    """Hints that are put back into the last interval. After each, what was decoded since the hint
    before is encoded anew in one forward, so that all is as in a fresh prompt."""

    replaces_loop = True  # of `generate`, as its `custom_generate`

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        model: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate(custom_generate=...)` calls: [1, tokens] ids, or an output with them.

        Raises:
            ValueError: a model that is not patched, a method that cannot take tokens back, several
                rows or padding, another prompt, beams, or an output of scores; before anything is
                decoded.
        """
        cache: Any = model_kwargs.get("past_key_values")
        mask = model_kwargs.pop("attention_mask", None)
        model_kwargs.pop("position_ids", None)
        self._refuse(cache, input_ids, mask, generation_config, streamer)
        config = copy.copy(generation_config)
        config.return_dict_in_generate = False
        ids, known = input_ids, input_ids.shape[1]  # tokens that were encoded in a prompt or anew
        while True:
            begun = ids.shape[1]
            tau = self.interval(begun)
            ids = model._sample(
                ids,
                logits_processor=logits_processor,
                stopping_criteria=StoppingCriteriaList(
                    [MaxLengthCriteria(begun + tau), *stopping_criteria]
                ),
                generation_config=config,
                attention_mask=torch.ones_like(ids),
                **model_kwargs,
            )
            if bool(stopping_criteria(ids, None).all()):
                break
            place = self._place(ids[0, begun:].tolist(), tau)
            if place is None or ids.shape[1] + len(self.hint) >= config.max_length:
                continue
            hint = ids.new_tensor([self.hint])
            ids = torch.cat([ids[:, : begun + place], hint, ids[:, begun + place :]], 1)
            cache.kv.method.rewind(cache.kv, known)
            known = ids.shape[1]
        if not generation_config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)

    def _place(self, new: list[int], tau: int) -> int | None:
        """How many of the new tokens stand before the hint; None: there is no mark."""

        def text(count: int) -> str:
            return str(self.tokenizer.decode(new[:count], clean_up_tokenization_spaces=False))

        whole = text(len(new))
        share = min((tau - self.alpha) / self.longest, LATEST)
        found = [(whole.find(mark, int(share * len(whole))), mark) for mark in self.ends]
        found = [(at, mark) for at, mark in found if at >= 0]
        if not found:
            return None
        at, mark = min(found)
        behind = at + len(mark.rstrip(" ") or mark)
        return bisect_left(range(len(new) + 1), behind, key=lambda count: len(text(count)))

    def _refuse(self, cache: Any, ids: Tensor, mask: Any, config: Any, streamer: Any) -> None:
        where = "ConciseHint: place='rewind'"
        refuse_others(where, cache, config, chunks=False)
        method = cache.kv.method
        able = method.croppable and cache.all_managed
        why = "layers that are not managed" if method.croppable else method.one_way
        expected = "a method that can take tokens back, such as full or delta"
        require(able, where, expected, f"{method.name}: {why}")
        padded = mask is not None and not bool(mask.all())
        require(len(ids) == 1 and not padded, where, "one row without padding", list(ids.shape))
        require(
            ids.shape[1] == self.prompt, where, f"a prompt of {self.prompt} columns", ids.shape[1]
        )
        require(streamer is None, where, "no streamer, as text changes that is written", streamer)
