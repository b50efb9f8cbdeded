"""Turns: reuse of a cache from one turn of a conversation to the next.

transformers' `generate` assumes that a prompt begins with the tokens in the cache and does not
check it. kvcomp refuses another text; `continue_from` goes back to the point where it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp.hf.outlast import outlasting
from kvcomp.hf.text import first_difference

if TYPE_CHECKING:
    from kvcomp.hf.cache import Cache
    from kvcomp.methods import Method


class Turns:
    """The part of a run that compares texts."""

    method: Method
    _logits_processor: Callable[..., Any]  # the model's own

    def _check_cache(self, cache: Any) -> None:
        raise NotImplementedError

    def _begin_generation(
        self, generation_config: Any, input_ids_seq_length: int, **rest: Any
    ) -> Any:
        """Replaces the model's own `_get_logits_processor`. At that point `generate` has prompt,
        mask and cache, and has not cut off the tokens in the cache yet."""
        given, kwargs = rest["encoder_input_ids"], rest["model_kwargs"]
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        mask = kwargs.get("attention_mask")
        columns = (
            getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        )
        text = given.repeat_interleave(copies, 0) if given.ndim == 2 else None
        self._check_text(kwargs["past_key_values"], text, mask, columns, len(given) * copies)
        processors = self._logits_processor(
            generation_config=generation_config,
            input_ids_seq_length=input_ids_seq_length,
            **rest,
        )
        return _drawing_last(processors, generation_config.do_sample)

    def _check_text(
        self, cache: Any, ids: Tensor | None, mask: Tensor | None, columns: int | None, rows: int
    ) -> None:
        """Raise ValueError if the text does not begin with the tokens in the cache.

        Args:
            ids: [rows, n] ids of the prompt; None: embeddings.
            mask, columns: padding mask [rows, columns]; None: no padding.
        """
        if cache.rows not in (0, rows):
            raise ValueError(
                f"kvcomp: past_key_values: it holds {cache.rows} sequences, but generate decodes"
                f" {rows}, num_beams or num_return_sequences copies of each prompt; give the whole"
                " prompts without a cache, or repeat the rows of a cache that can:"
                " cache.batch_repeat_interleave(copies)"
            )
        seen = int(cache.get_seq_length())
        if not seen or ids is None or columns not in (None, ids.shape[1]):
            return  # with a longer mask, all ids are new
        if ids.shape[1] <= seen:
            raise ValueError(
                f"kvcomp: generate: input_ids: {ids.shape[1]} tokens, but the cache has seen"
                f" {seen}: expected the whole text, or the new tokens with an attention_mask of all"
                f" {seen + ids.shape[1]}"
            )
        differs = self._first_difference(cache, ids, mask, seen)
        if differs is not None:
            column, row = differs
            raise ValueError(
                "kvcomp: generate: input_ids: expected the text that the cache has seen and more;"
                f" row {row} is another one from token {column} of {seen} on (a chat template may"
                " have cut a thought out). Pass past_key_values=run.continue_from(cache,"
                " input_ids, attention_mask), or no cache"
            )

    def _first_difference(
        self, cache: Any, ids: Tensor, mask: Tensor | None, seen: int
    ) -> tuple[int, int] | None:
        """Column and row where the first `seen` columns differ from the cache."""
        known = cache.text.known(seen)
        if known is None:
            return None
        ids = ids[:, :seen].to(known.device)
        mask = torch.ones_like(ids) if mask is None else mask[:, :seen]
        shown = cache.kv.layers[0].seen()[:, :seen]
        return first_difference(known, ids, shown.to(known.device), mask.to(known.device).bool())

    @outlasting
    def continue_from(
        self, cache: Any, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Any:
        """Make a cache of an earlier turn fit another text, which may differ from what it has seen.

            cache = run.continue_from(cache, ids)
            model.generate(ids, past_key_values=cache, ...)

        The common beginning of both texts stays if the method can go back to its end; otherwise the
        cache starts again. Chat templates of reasoning models cut thoughts out of earlier turns, so
        the text of a further turn does not continue the text in the cache.

        Args:
            cache: a cache of this run, from `new_cache` or `generate`. It is changed.
            input_ids: [B, tokens], the whole text of the next turn.
            attention_mask: [B, tokens], 0 for padding.

        Returns:
            `cache`. Pass it with the same `input_ids` and `attention_mask`. Its `get_seq_length()`
            is the number of tokens that stay.

        Raises:
            ValueError: the cache belongs to another run.
        """
        self._check_cache(cache)
        kept = self._common(cache, input_ids, attention_mask)
        if kept < int(cache.get_seq_length()):
            if kept and cache.all_managed:
                self.method.rewind(cache.kv, kept)
            else:
                cache.reset()
        return cache

    def _common(self, cache: Cache, ids: Tensor, mask: Tensor | None) -> int:
        """The number of first columns that text and cache share, less than the whole text."""
        most = min(int(cache.get_seq_length()), ids.shape[1] - 1)
        if cache.rows != len(ids) or cache.text.known(int(cache.get_seq_length())) is None:
            return 0
        differs = self._first_difference(cache, ids, mask, most)
        return most if differs is None else differs[0]

    def _read(self, cache: Any, ids: Tensor | None) -> None:
        """Note the ids [B, n] that come in; None: embeddings."""
        cache.read(ids)


def _drawing_last(processors: Any, sampling: bool) -> Any:
    """Those that draw a token (`comes_last`) behind the warpers, and only where one is drawn."""
    drawing = [each for each in processors if getattr(each, "comes_last", False)]
    others = [each for each in processors if each not in drawing]
    return type(processors)([*others, *(drawing if sampling else [])])
