"""ChunkedRun: a run whose caches go through several contexts, under `Delethink`."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.rotation import CHANGING
from kvcomp.hf.run import Run
from kvcomp.methods import Delethink


class ChunkedRun(Run):
    """A run under `Delethink`: `generate` holds a `ChunkedCache`, and each forward goes to the
    context that this one has at the time.

    Raises:
        TypeError, ValueError: as `patch`, and for chunks that do not fit the model. The model is as
            before.
    """

    cache_class = ChunkedCache
    method: Delethink

    def __init__(self, model: PreTrainedModel, method: Delethink) -> None:
        self._caches: weakref.WeakSet[ChunkedCache] = weakref.WeakSet()
        self._thread = threading.local()  # what the forward or `generate` of a thread works on
        super().__init__(model, method)

    @property
    def encoding(self) -> bool:
        return getattr(self._thread, "encoding", False)

    def new_cache(self) -> ChunkedCache:
        longest = getattr(self.config, "max_position_embeddings", None)
        cache = ChunkedCache(self.method, super().new_cache, longest)
        self._caches.add(cache)
        return cache

    def undo(self) -> None:
        for cache in self._caches:
            cache.settle()  # a context under way in the background would lose its attention
        super().undo()

    def _refuse(self, first: Cache) -> None:
        refuse_chunks(self.model, self.method, first)

    def _apply(self) -> None:
        super()._apply()
        self._replace("_get_logits_processor", self._announce_prompt)

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict, mode: Any, *args: Any
    ) -> None:
        super()._prepare_cache(generation_config, model_kwargs, mode, *args)
        if "beam" in str(mode).lower():
            raise ValueError(
                "kvcomp: generate(num_beams=...): delethink has no beam search, because every beam"
                " would need its own context; sample with num_return_sequences"
            )
        if generation_config.eos_token_id is None:
            raise ValueError(
                "kvcomp: delethink: the model names no EOS token, so generation could only end with"
                " the budget; pass generate(eos_token_id=...)"
            )
        self._thread.prepared = model_kwargs["past_key_values"]

    def _announce_prompt(
        self, generation_config: Any, input_ids_seq_length: int, **rest: Any
    ) -> Any:
        """In place of the model's own `_get_logits_processor`: there `generate` says how long the
        prompt is, and it has not made up its mind yet when to end."""
        self._thread.prepared.announce(input_ids_seq_length)
        if self.method.budget is not None:
            most = input_ids_seq_length + self.method.budget
            generation_config.max_length = min(generation_config.max_length, most)
        return type(self.model)._get_logits_processor(
            self.model,
            generation_config=generation_config,
            input_ids_seq_length=input_ids_seq_length,
            **rest,
        )

    def _enter(self, cache: Any, given: dict) -> tuple[Cache, dict]:
        if self.encoding:  # a context, filled by `_encode`
            return cache, given
        self._check_cache(cache)
        given = cache.enter(given, self._encode)
        self._thread.entered = cache
        return cache.context, given

    def _encode(self, cache: Cache, **given: Any) -> None:
        """Feed tokens to a context beside the forward that the user has called."""
        self._thread.encoding = True
        try:
            with torch.no_grad():
                self.model.get_decoder()(**given, past_key_values=cache, use_cache=True)
        finally:
            self._thread.encoding = False

    def _after_forward(self, decoder: Any, args: Any, output: Any) -> None:
        """As `Run._after_forward`; the caller gets the cache back that it has given."""
        if self.encoding:
            self._end_forward()
            return
        super()._after_forward(decoder, args, output)
        entered, self._thread.entered = getattr(self._thread, "entered", None), None
        if entered is not None and isinstance(output, ModelOutput):
            output["past_key_values"] = entered


def refuse_chunks(model: PreTrainedModel, method: Delethink, cache: Cache) -> None:
    """Raise ValueError, with the reason, for a model that cannot be chunked in that way."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if longest is not None and method.most_thought >= longest:
        raise ValueError(
            f"kvcomp.Delethink: chunk: {method.most_thought} tokens of output in a context, but"
            f" {type(model).__name__} knows only {longest} positions"
        )
    if method.reset == "rotate":
        cache.kv.require_rotation()
        if not cache.all_managed:
            raise ValueError(
                f"kvcomp.Delethink: reset='rotate': {type(model).__name__} has layers whose cache"
                " does not keep every token; use 'prefill'"
            )
    if method.reset == "streaming" and not method.attention.forks:
        raise ValueError(
            f"kvcomp.Delethink: reset='streaming' holds two contexts, and"
            f" {type(method.attention).__name__} would hold the prompt twice in host memory; use"
            " 'prefill'"
        )
    if method.reset == "streaming" and getattr(rotary, "rope_type", "default") in CHANGING:
        raise ValueError(
            f"kvcomp.Delethink: reset='streaming': {type(model).__name__} changes its rotary"
            " frequencies with the length, which differs between two contexts; use 'prefill'"
        )
