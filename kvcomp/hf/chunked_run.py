"""ChunkedRun: a run whose caches go through several contexts, under `Delethink`."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.rotation import changes_with_length
from kvcomp.hf.run import Run
from kvcomp.methods import Delethink


class ChunkedRun(Run):
    """A run under `Delethink`. `generate` holds a `ChunkedCache`, and each forward uses its current
    context.

    Raises:
        TypeError, ValueError: as for `patch`, and for chunks that do not fit the model. The model
            has not changed.
    """

    cache_class = ChunkedCache
    method: Delethink

    def __init__(self, model: PreTrainedModel, method: Delethink, **options: Any) -> None:
        self._thread = threading.local()  # state of the forward or `generate` of each thread
        super().__init__(model, method, **options)
        self._counts_padding = counts_padding(self.model, self.decoder)

    @property
    def encoding(self) -> bool:
        return getattr(self._thread, "encoding", False)

    @contextmanager
    def encodes(self) -> Iterator[None]:
        """A context whose forwards fill a cache and decode nothing."""
        self._thread.encoding = True
        try:
            yield
        finally:
            self._thread.encoding = False

    def new_cache(self) -> ChunkedCache:
        longest = getattr(self.config, "max_position_embeddings", None)
        whole = changes_with_length(self.model)
        return ChunkedCache(
            self.method, self._new_context, longest, whole=whole, renews=self._renews
        )

    def _refuse(self, first: Cache) -> None:
        refuse_chunks(self.model, self.method, first)

    def _apply(self) -> None:
        self._stock_inputs = self.model.prepare_inputs_for_generation
        super()._apply()

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
        self._thread.prepared = weakref.ref(model_kwargs["past_key_values"])

    def _begin_generation(
        self, generation_config: Any, input_ids_seq_length: int, **rest: Any
    ) -> Any:
        """Like `Run._begin_generation`. It also tells the cache the length of the prompt, and
        `generate`, which has not fixed its end yet, the length of the chunks."""
        self._thread.prepared().announce(input_ids_seq_length)
        if self.method.budget is not None:
            most = input_ids_seq_length + self.method.budget
            generation_config.max_length = min(generation_config.max_length, most)
        return super()._begin_generation(generation_config, input_ids_seq_length, **rest)

    def _first_difference(self, cache: ChunkedCache, ids: Any, mask: Any, seen: int) -> Any:
        return cache.first_difference(ids, mask)

    def continue_from(
        self, cache: ChunkedCache, input_ids: Any, attention_mask: Any = None
    ) -> ChunkedCache:
        """Start again: delethink has dropped earlier thoughts, so its cache fits no other text."""
        self._check_cache(cache)
        cache.reset()
        return cache

    def _prepare_inputs(self, prepare: Callable, input_ids: Tensor, **given: Any) -> dict:
        """Undo the drop of the cache at a certain length by some models. They use the length that
        `generate` has seen and not the length of the context."""
        inputs = prepare(input_ids, **given)
        if given.get("past_key_values") is not None and inputs.get("past_key_values") is None:
            ids: Any = input_ids  # by its annotation a LongTensor, which no tensor is
            return GenerationMixin.prepare_inputs_for_generation(self.model, ids, **given)
        return inputs

    def _renews(self, context: Cache, columns: int) -> bool:
        """Whether the model's own `generate` would drop this cache and encode everything again when
        its token number `columns` comes in."""
        stock = self._stock_inputs
        if getattr(stock, "__func__", None) is GenerationMixin.prepare_inputs_for_generation:
            return False
        ids = torch.zeros(1, columns, dtype=torch.long, device=self.model.device)
        inputs = stock(ids, past_key_values=context, next_sequence_length=1, use_cache=True)
        return inputs.get("past_key_values") is None

    def _enter(self, cache: Any, given: dict) -> tuple[Cache, dict]:
        if self.encoding:  # a context, filled by `_encode`
            return cache, given
        self._check_cache(cache)
        given = self.wrapper.with_ids(given)
        ids = given.get("input_ids")
        self._refuse_padding(given)
        self._thread.count = 0 if ids is None else ids.shape[1]
        given = cache.enter(given, self._encode)
        self._thread.entered = cache
        return cache.context, given

    def _refuse_padding(self, given: dict) -> None:
        """Raise ValueError for padding in a model that counts it in the positions that it learned,
        which differ from those of a context then."""
        mask = given.get("attention_mask")
        if self._counts_padding and isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                f"kvcomp: delethink: {type(self.model).__name__} counts padding as positions, so"
                " rows with padding would change from context to context; give rows of one length"
            )

    def _encode(self, cache: Cache, **given: Any) -> None:
        """Feed tokens to a context besides the user's own forward."""
        with self.encodes(), torch.no_grad():
            self.decoder(**given, past_key_values=cache, use_cache=True)

    def _after_forward(self, output: Any) -> Any:
        """Like `Run._after_forward`. The caller gets its own cache back."""
        if self.encoding:
            self._end_forward()
            return output
        entered = getattr(self._thread, "entered", None)  # not without a cache
        super()._after_forward(output)
        if entered is None:
            return output
        entered.left()
        if isinstance(output, ModelOutput):
            output["past_key_values"] = entered
            if self._thread.count == 1:  # the caller knows only the last token of the context
                for name in {"last_hidden_state", "logits"} & output.keys():
                    output[name] = output[name][:, -1:]
        return output

    def _end_forward(self) -> None:
        super()._end_forward()
        if not self.encoding:
            self._thread.entered = None


def counts_padding(model: PreTrainedModel, decoder: Module) -> bool:
    """Whether `generate` gives a model no positions, and it embeds those that it counts itself."""
    return "position_ids" not in inspect.signature(model.forward).parameters and any(
        isinstance(module, Embedding) and "position" in name
        for name, module in decoder.named_modules()
    )


def refuse_chunks(model: PreTrainedModel, method: Delethink, cache: Cache) -> None:
    """Raise ValueError, with the reason, for a model that cannot run in such chunks."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
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
    if method.reset == "streaming" and changes_with_length(model):
        raise ValueError(
            f"kvcomp.Delethink: reset='streaming': {type(model).__name__} changes its rotary"
            " frequencies with the length, which differs between two contexts; use 'prefill'"
        )
