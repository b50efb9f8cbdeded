"""patch(model, method, max_tokens=N): a preallocated cache, and decode steps that compile.

Memory is allocated once, lengths are tensors, and masks stay outside. So a decode step is one graph
for all lengths, which `generate` compiles as it does for transformers' static caches. Work that a
method does every few steps, such as an eviction, runs on the host between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp.cache import Report, StaticKVCache, StaticMeter
from kvcomp.checks import is_whole, require
from kvcomp.hf.cache import Cache
from kvcomp.hf.compiled import announced, frozen, keep_code
from kvcomp.hf.layer import Layer
from kvcomp.hf.outlast import outlasting
from kvcomp.hf.run import BROKEN, Run
from kvcomp.hf.static_cache import StaticCache
from kvcomp.hf.text import first_difference
from kvcomp.hf.wrapper import one_of
from kvcomp.methods import Method

COMPILED = ("_compiled_call", "_last_compile_config")  # of a model's compiled steps


class StaticRun(Run):
    """A run whose decode steps are one graph of fixed shapes and addresses.

    `generate` without a given cache reuses one cache, unless it returns the cache
    (`return_dict_in_generate`), or runs within another `generate`. `new_cache()` allocates another
    one. One thread decodes at a time; another gets a ValueError meanwhile. Steps that run without
    the host, such as replays of a graph that you captured, are counted but not timed; methods that
    evict need `with cache.step():` around each of them. Times include compilation.

    Raises:
        TypeError, ValueError: as for `patch`, and for a method or a model whose steps depend on the
            length. The model has not changed.
    """

    meter_class = StaticMeter
    meter: StaticMeter
    cache_class = StaticCache
    current: StaticCache | None = None  # a plain attribute, because a graph may set it

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        max_tokens: int,
        *,
        linear_rows: bool = True,
        kv: str = "model",
        kv_rotate: bool | None = None,
    ) -> None:
        where = "kvcomp.patch: max_tokens"
        require(is_whole(max_tokens), where, "a number", max_tokens, TypeError)
        require(max_tokens >= 1, where, "at least 1", max_tokens)
        self.max_tokens = max_tokens
        self._own: StaticCache | None = None  # for the next `generate`, which takes it
        self._lent: StaticCache | None = None  # to the running `generate`
        self._decodes = threading.RLock()  # held by the thread that does
        self._decoding = False  # whether the running forward is a decode step
        self._inside = False  # whether a forward is running
        self._beside = False  # whether `_step` does the work of the host
        super().__init__(model, method, linear_rows=linear_rows, kv=kv, kv_rotate=kv_rotate)
        self._needs_host = type(method).between_steps is not Method.between_steps

    def report(self, layers: bool = False) -> Report:
        self.meter.settle()
        return super().report(layers)

    def compile(self, *, freeze: bool = False, **options: Any) -> Callable:
        """Compile the model for your own loops: `step(ids, past_key_values=cache, ...)`.

        The first step compiles, which takes a minute or so, and so does the first one of each other
        batch size. Inductor keeps the code for other runs: for a CPU in a folder of kvcomp's cache,
        unless TORCHINDUCTOR_CACHE_DIR names another.

        Args:
            freeze: on a CPU, let inductor pack the weights for its own linear layers ("freezing")
                instead of reading them in place with `linear_rows`. This keeps every weight twice,
                and later changes of the weights are not seen. It can pay for more than 8 sequences.
            options: options of `torch.compile`. Default: one graph, captured as a CUDA graph.

        Returns:
            a function that runs prompts eagerly and steps of one token compiled. It raises
            ValueError if the cache has no room for the tokens.

        Raises:
            ValueError: `freeze` for a model that is not on a CPU.
        """
        on_cpu = self.model.device.type == "cpu"
        if freeze and not on_cpu:
            raise ValueError(
                "kvcomp: compile: freeze: expected a model on a CPU, for which weights are packed,"
                f" got one on {self.model.device}"
            )
        if on_cpu:
            keep_code()
        options = options or {"fullgraph": True, "mode": "reduce-overhead"}
        step: Callable = torch.compile(self.model, **options)
        return self._step(frozen(step) if freeze else step)

    def new_cache(self) -> StaticCache:
        """A new cache of this run with its own memory."""
        return StaticCache(self.config, self.method, self.meter, self.max_tokens, self.eight_bits)

    def _refuse(self, first: Cache) -> None:
        if not self.method.static:
            raise ValueError(
                f"kvcomp.patch: max_tokens: {type(self.method).__name__} needs the host within"
                " a step, or new memory in every step, which one graph for all steps cannot do;"
                " leave max_tokens out"
            )
        if not first.all_managed:
            raise ValueError(
                f"kvcomp.patch: max_tokens: {type(self.model).__name__} has sliding or linear"
                " layers, which cannot use a static cache; leave max_tokens out"
            )
        ours = [layer for layer in first.layers if isinstance(layer, Layer)]
        windows = [layer.window for layer in ours if layer.window is not None]
        if windows and self.max_tokens > min(windows):
            raise ValueError(
                f"kvcomp.patch: max_tokens: expected at most {min(windows)}, from where on the"
                f" layers of {type(self.model).__name__} no longer attend to all tokens, got"
                f" {self.max_tokens}"
            )
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            raise ValueError(
                f"kvcomp.patch: max_tokens: {type(self.model).__name__} is spread over several"
                " devices, but a graph runs on one; leave max_tokens out"
            )

    def _apply(self) -> None:
        super()._apply()
        state = self.model.__dict__
        before = {name: state.pop(name) for name in COMPILED if name in state}

        def restore() -> None:
            for name in COMPILED:
                state.pop(name, None)
            state.update(before)
            self._own = None

        self._undo.append(restore)
        self._compiled_call = self.model.get_compiled_call
        self._replace(self.model, "get_compiled_call", self._get_compiled_call)

    def _prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict,
        mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if max_cache_length > self.max_tokens:
            raise ValueError(
                f"kvcomp: generate: prompt and output need room for {max_cache_length} tokens"
                f" (padding included), more than patch(max_tokens={self.max_tokens})"
            )
        if "assisted" in str(mode).lower():
            raise ValueError(
                "kvcomp: assisted decoding takes tokens back, but a static cache cannot; leave"
                " patch(max_tokens=...) out"
            )
        returned = generation_config.return_dict_in_generate
        if model_kwargs.get("past_key_values") is None and not returned:
            self._lent = self.new_cache() if self._own is None else self._own
            self._own = None
            self._lent.reset()
            model_kwargs["past_key_values"] = self._lent
        super()._prepare_cache(generation_config, model_kwargs, mode)

    def _generating(self, generate: Callable) -> Callable:
        generating = super()._generating(generate)

        @wraps(generate)
        def alone(*args: Any, **given: Any) -> Any:
            with self._alone():
                outer, self._lent = self._lent, None
                try:
                    return generating(*args, **given)
                finally:
                    if self._lent is not None and not self._gate.closed:
                        self._own = self._lent
                    self._lent = outer

        return alone

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context in which no other thread may decode, whose steps would share its state."""
        if not self._decodes.acquire(blocking=False):
            raise ValueError(
                "kvcomp: patch(max_tokens=...): expected one thread at a time, but another one is"
                " decoding; wait for it, or leave max_tokens out"
            )
        try:
            yield
        finally:
            self._decodes.release()

    def _get_compiled_call(self, compile_config: Any) -> Callable:
        """Replaces the model's own: its compiled forward plus the work of the host."""
        return self._step(self._compiled_call(compile_config))

    def _step(self, compiled: Callable) -> Callable:
        compiled = announced(compiled)

        def step(input_ids: Tensor, *, past_key_values: StaticCache, **given: Any) -> Any:
            self._gate.require_open()
            self._check_attention()
            given |= {"input_ids": input_ids, "past_key_values": past_key_values}
            self._check_cache(past_key_values)
            if input_ids.shape[1] > 1 or not past_key_values.kv.seen:  # a prompt
                return self.model(**given)
            if past_key_values.broken:
                raise ValueError(f"kvcomp: past_key_values: {BROKEN}")
            with self._alone(), self._gate.forward():
                past_key_values.text.add(input_ids, past_key_values.columns)
                self._beside = True
                try:
                    with past_key_values.step():
                        out = compiled(**given)
                except BaseException:
                    past_key_values.broken = True
                    past_key_values.leave()
                    raise
                finally:
                    self._beside = False
            self._clock(decoding=True)
            return out

        return step

    def _forward(self, forward: Callable, given: dict) -> Any:
        if not torch.compiler.is_compiling():
            with self._alone():
                return super()._forward(forward, given)
        if self._needs_host and not self._beside:
            raise ValueError(
                f"kvcomp: torch.compile: {type(self.method).__name__} evicts between steps,"
                " which compiling the model alone leaves out; use run.compile()"
            )
        cache: Any = given.get("past_key_values")
        mask = one_of(given.get("attention_mask"))
        self._check_attention()
        self._check_cache(cache)
        cache.padding = mask[:, -1:].bool() if isinstance(mask, Tensor) else None
        cache.entered = True
        self.current, self._inside = cache, True
        output = forward(**given)
        self.current, self._inside = None, False
        cache.padding, cache.entered = None, False
        return output

    def _before_forward(self, given: dict) -> dict:
        self._decoding, self._inside = False, True
        return super()._before_forward(given)

    def _read(self, cache: StaticCache, ids: Tensor | None) -> None:
        if not self._beside and not self._capturing:
            super()._read(cache, ids)

    def _first_difference(
        self, cache: StaticCache, ids: Tensor, mask: Tensor | None, seen: int
    ) -> tuple[int, int] | None:
        """Like `Run._first_difference`, but the cache does not know which columns were padding."""
        known = cache.text.known(seen)
        if known is None:
            return None
        ids = ids[:, :seen].to(known.device)
        mask = torch.ones_like(ids) if mask is None else mask[:, :seen].to(known.device)
        return first_difference(known, ids, mask.bool(), mask.bool())

    def continue_from(
        self, cache: StaticCache, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> StaticCache:
        """Like `Run.continue_from`, but a static cache cannot take tokens back. Unless the text
        begins with all tokens that the cache has seen, it starts again."""
        self._check_cache(cache)
        if self._common(cache, input_ids, attention_mask) < int(cache.get_seq_length()):
            cache.reset()
        return cache

    def _new_padding(self, cache: Cache, mask: Any, count: int) -> Tensor | None:
        if count > 1:
            padding = super()._new_padding(cache, mask, count)
        else:
            padding = None if mask is None else mask[:, -1:].bool()
        kv = cache.kv
        assert isinstance(kv, StaticKVCache), "the run has no other caches"
        decoding = count == 1 and kv.seen > 0
        if not self._beside and not self._capturing:
            kv.enter(count)
        self._decoding = decoding
        return padding

    def _end_forward(self) -> None:
        self._inside = False
        super()._end_forward()

    def _after_forward(self, output: Any) -> Any:
        cache = self.current
        self._end_forward()
        if not self._beside and not self._capturing:
            if self._decoding and cache is not None:
                outlasting(cache.kv.leave)()
            self._clock(self._decoding)
        return output

    @property
    def _capturing(self) -> bool:
        """Whether a graph is being captured, so that forwards do not execute anything."""
        return self.model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def mask(self, *args: Any, q_length: int, attention_mask: Any = None, **kwargs: Any) -> Any:
        """None for decode steps, because the cache knows the valid tokens."""
        if not self._inside and not self.wrapper.running:
            # `generate` prepares masks ahead, and the forward makes its own.
            return attention_mask if q_length > 1 else None
        if self.current is None:  # there is no cache, or a wrapper makes it
            return super().mask(*args, q_length=q_length, attention_mask=attention_mask, **kwargs)
        if q_length == 1 or self.current.kv.seen > q_length:
            return None
        return super().mask(*args, q_length=q_length, attention_mask=attention_mask, **kwargs)
