"""patch(model, method): put a method under a model's `generate` and forward, and take it back.

No forward is copied. The model's attention implementation becomes ours, a pre-hook on the decoder
supplies the cache and the padding of each forward, and `generate` is handed our cache.
"""

from __future__ import annotations

import inspect
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from kvcomp.cache import Meter
from kvcomp.hf import attention
from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked import ChunkedCache
from kvcomp.hf.refusals import refuse, refuse_chunks
from kvcomp.hf.report import Report
from kvcomp.hf.rotation import key_rotation
from kvcomp.methods import Delethink, Method


def patch(model: PreTrainedModel, method: Method, *, max_tokens: int | None = None) -> Run:
    """Decode with `method` until `undo()`, or within a `with` block.

        with kvcomp.patch(model, kvcomp.Delta(budget=1024)) as run:
            out = model.generate(**inputs, max_new_tokens=16384)
        print(run.report())

    Args:
        model: a Hugging Face causal LM whose attention goes through `AttentionInterface`.
        method: a `Method`; its figures are counted by the run.
        max_tokens: prompt and output, if the cache is to be of one size from the start. Decode
            steps then compile as one graph: transformers does so by itself on a GPU, and
            `run.compile()` does for loops of one's own. See `kvcomp.hf.StaticRun`.

    Raises:
        TypeError: not a transformers model, not a method, or `max_tokens` not a whole number.
        ValueError: the model is patched already, or does what a method cannot do exactly
            (soft-capped logits, latent attention, an unsupported head size), or the method's
            parameters do not fit its layers. The model is as before.
    """
    if max_tokens is None:
        return Run(model, method)
    from kvcomp.hf.static import StaticRun  # it builds on what is below

    return StaticRun(model, method, max_tokens)


class Run:
    """One patched model: hands out caches, counts, and undoes itself.

    Attributes:
        inner_name: the attention implementation that the user had.
        meter: counts over all caches of this run.
    """

    meter_class: ClassVar[type[Meter]] = Meter

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
            raise TypeError(
                "kvcomp.patch: model: expected a transformers model that can generate, got"
                f" {type(model).__name__}"
            )
        if not isinstance(method, Method):
            raise TypeError(
                f"kvcomp.patch: method: expected a kvcomp method such as Delta(), got {method!r}"
            )
        refuse(model)
        self.model, self.method = model, method
        self.config = model.config.get_text_config(decoder=True)
        self.inner_name = self.config._attn_implementation
        self.inv_freq = key_rotation(model) if method.moves_keys else None
        first = Cache(self.config, method, None, self.inv_freq)
        self.chunked = isinstance(method, Delethink)
        self._refuse(first)
        self.meter = self.meter_class(len(first.kv.layers))
        self._decode_seconds = 0.0
        self._decoded_before = 0
        self._last_forward: float | None = None  # when the latest forward ended
        self._running = threading.local()
        self._chunked_caches: weakref.WeakSet[ChunkedCache] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        try:
            self._apply()
        except BaseException:
            self.undo()
            raise

    @property
    def current(self) -> Cache | None:
        """The cache of the forward that runs in this thread."""
        return getattr(self._running, "cache", None)

    @current.setter
    def current(self, cache: Cache | None) -> None:
        self._running.cache = cache

    def new_cache(self) -> Cache | ChunkedCache:
        """A fresh cache of this run, for loops that call the model themselves."""
        if self.chunked:
            longest = getattr(self.config, "max_position_embeddings", None)
            cache = ChunkedCache(self.method, self._new_context, longest)
            self._chunked_caches.add(cache)
            return cache
        return self._new_context()

    def _new_context(self) -> Cache:
        return Cache(self.config, self.method, self.meter, self.inv_freq)

    def report(self, layers: bool = False) -> Report:
        """What the run has decoded so far; `layers=True` adds the figures of each layer."""
        return Report.of(self.method, self.meter, self._decode_seconds, layers)

    def undo(self) -> None:
        """Leave the model as it was; calling it again does nothing."""
        for cache in self._chunked_caches:
            cache.settle()  # a context under way in the background would lose its attention
        while self._undo:
            self._undo.pop()()

    def __getstate__(self) -> dict:
        raise TypeError("kvcomp: a patched model cannot be copied or pickled; undo() the run first")

    def __enter__(self) -> Run:
        if not self._undo:
            raise RuntimeError("kvcomp: this run has been undone; call kvcomp.patch again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def _refuse(self, first: Cache) -> None:
        """Raise ValueError for what this kind of run cannot do with its model and method."""
        if self.chunked:
            refuse_chunks(self.model, self.method, first)

    def _apply(self) -> None:
        attention.register()
        model, config = self.model, self.config
        decoder = model.get_decoder()
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.__dict__["_kvcomp_run"] = self
                self._undo.append(lambda module=module: module.__dict__.pop("_kvcomp_run"))
        attention.RUNS[id(config)] = self
        self._undo.append(lambda: attention.RUNS.pop(id(config)))
        self._set_attention(attention.NAME)
        self._undo.append(lambda: self._set_attention(self.inner_name))
        for handle in (
            decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            decoder.register_forward_hook(self._after_forward, always_call=True),
        ):
            self._undo.append(handle.remove)
        self._replace("_prepare_cache_for_generation", self._prepare_cache)
        if self.chunked:
            self._replace("_get_logits_processor", self._announce_prompt)

    def _replace(self, name: str, function: Callable) -> None:
        """A step of `generate` by ours."""
        setattr(self.model, name, function)
        self._undo.append(lambda: self.model.__dict__.pop(name))

    def _set_attention(self, name: str) -> None:
        self.model.set_attn_implementation(name)
        if self.config._attn_implementation != name:
            raise ValueError(
                f"kvcomp.patch: {type(self.model).__name__} does not take its attention from"
                " transformers' AttentionInterface"
            )

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict, mode: Any, *args: Any
    ) -> None:
        """In place of the model's own: `generate` gets our cache."""
        if generation_config.use_cache is False:
            raise ValueError("kvcomp: generate(use_cache=False): a method needs its cache")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "kvcomp: generate(cache_implementation="
                f"{generation_config.cache_implementation!r}): the patched model brings its cache"
            )
        if "assisted" in str(mode).lower() and not self.method.croppable:
            raise ValueError(
                f"kvcomp: assisted decoding takes tokens back, which {self.method.name} cannot do"
                " exactly once it has dropped some"
            )
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()
        self._check_cache(model_kwargs["past_key_values"])
        if self.chunked:
            self._prepare_chunks(generation_config, model_kwargs["past_key_values"], mode)

    def _prepare_chunks(self, generation_config: Any, cache: ChunkedCache, mode: Any) -> None:
        if "beam" in str(mode).lower():
            raise ValueError(
                "kvcomp: generate(num_beams=...): the beams of delethink would have to carry their"
                " own contexts along when they are reordered; sample with num_return_sequences"
            )
        if generation_config.eos_token_id is None:
            raise ValueError(
                "kvcomp: delethink: the model names no EOS token, so its thinking could only end"
                " with the budget; pass generate(eos_token_id=...)"
            )
        self._running.prepared = cache

    def _announce_prompt(
        self, generation_config: Any, input_ids_seq_length: int, **rest: Any
    ) -> Any:
        """In place of the model's own `_get_logits_processor`: there `generate` says how long the
        prompt is, and it has not made up its mind yet when to end."""
        self._running.prepared.announce(input_ids_seq_length)
        if self.method.budget is not None:
            most = input_ids_seq_length + self.method.budget
            generation_config.max_length = min(generation_config.max_length, most)
        return type(self.model)._get_logits_processor(
            self.model,
            generation_config=generation_config,
            input_ids_seq_length=input_ids_seq_length,
            **rest,
        )

    def _check_cache(self, cache: Any) -> None:
        kind = ChunkedCache if self.chunked else Cache
        if not isinstance(cache, kind) or cache.meter is not self.meter:
            raise ValueError(
                "kvcomp: past_key_values: expected a cache of this run (run.new_cache(), or the one"
                f" that generate returned), got {type(cache).__name__}"
            )

    def _before_forward(self, decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Supply the cache, and work out which of the new tokens are padding."""
        given = kwargs
        if args:  # by position: name them
            names = inspect.signature(decoder.forward).parameters
            given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("output_attentions") or self.config.output_attentions:
            raise ValueError("kvcomp: output_attentions: the kernels never form the weights")
        cache = given.get("past_key_values")
        if cache is None and (
            self.config.use_cache if given.get("use_cache") is None else given["use_cache"]
        ):
            cache = given["past_key_values"] = self.new_cache()
        self.current = None
        if cache is not None:
            if not self.encoding:
                self._check_cache(cache)
            if isinstance(cache, ChunkedCache):
                given = cache.enter(given, self._encode)
                self._running.chunked, cache = cache, cache.context
            self.current = cache
            tokens = given.get("input_ids")
            tokens = given.get("inputs_embeds") if tokens is None else tokens
            cache.padding = self._new_padding(cache, given.get("attention_mask"), tokens.shape[1])
            cache.entered = True
        if self._last_forward is None:
            self._last_forward = time.perf_counter()
        return (), given

    @property
    def encoding(self) -> bool:
        """Whether the forward that runs in this thread makes a context, and decodes nothing."""
        return getattr(self._running, "encoding", False)

    def _encode(self, cache: Cache, **given: Any) -> None:
        """Feed tokens to a cache beside the forward that the user has called."""
        self._running.encoding = True
        try:
            with torch.no_grad():
                self.model.get_decoder()(**given, past_key_values=cache, use_cache=True)
        finally:
            self._running.encoding = False

    def _new_padding(self, cache: Cache, mask: Any, count: int) -> Tensor | None:
        """[B, count] bool of the valid new tokens; None when all are."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError(
                "kvcomp: attention_mask: expected [B, tokens] of 0 and 1 (padding only), got"
                f" {list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        seen, first = int(cache.get_seq_length()), cache.kv.layers[0]
        if mask.shape[1] != seen + count:
            raise ValueError(
                f"kvcomp: attention_mask: expected {seen + count} columns ({seen} seen, {count}"
                f" new), got {mask.shape[1]}"
            )
        if seen and count > 1 and not first.shows(mask[:, :seen].bool()):
            raise ValueError(
                "kvcomp: attention_mask: hides tokens that are in the cache already, or shows"
                " padding that never entered it"
            )
        valid = mask[:, -count:].bool()
        # Reading the device once per prompt is fine; at every decode step it would stall it.
        return None if (count > 1 or not valid.is_cuda) and bool(valid.all()) else valid

    def _after_forward(self, decoder: Any, args: Any, output: Any) -> Any:
        """Measure the time; who called gets the cache back that it has given."""
        if self.current is not None:
            self.current.entered = False
        self.current = None
        if self.encoding:
            return
        decoded = self.meter.tokens_decoded
        self._clock(decoded > self._decoded_before)
        self._decoded_before = decoded
        chunked, self._running.chunked = getattr(self._running, "chunked", None), None
        if chunked is not None and isinstance(output, ModelOutput):
            output["past_key_values"] = chunked

    def _clock(self, decoding: bool) -> None:
        """A forward has ended."""
        if not decoding and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # once per prompt: its work is not decoding
        now = time.perf_counter()
        if decoding:
            self._decode_seconds += now - self._last_forward
        self._last_forward = now

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask function of `attention.NAME`: that of the implementation that the user had."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.inner_name](*args, **kwargs)
