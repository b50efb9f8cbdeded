"""Run: decodes a model with a method until `undo`.

No forward is copied. The model uses kvcomp's attention implementation, a wrapper around the
decoder's forward supplies its cache and its padding, and `generate` gets kvcomp's cache.
"""

from __future__ import annotations

import inspect
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial, wraps
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvcomp.cache import Meter, Report
from kvcomp.checks import require
from kvcomp.hf import attention
from kvcomp.hf.cache import Cache
from kvcomp.hf.checkpoints import without_cache, without_checkpoints
from kvcomp.hf.decoder import attention_modules, decoder_of
from kvcomp.hf.eight_bits import eight_bits
from kvcomp.hf.gate import Gate
from kvcomp.hf.generation import Generation
from kvcomp.hf.latent import EXPAND, Latents, as_stored, keeps_latents
from kvcomp.hf.layer import SKIPS, Layer
from kvcomp.hf.linear import LinearLayers, speed_up
from kvcomp.hf.norm import speed_up_norms
from kvcomp.hf.outlast import outlasting
from kvcomp.hf.refusals import refuse, unwrapped
from kvcomp.hf.rotary import speed_up_rotations
from kvcomp.hf.rotation import key_rotation
from kvcomp.hf.wrapper import Wrapper
from kvcomp.methods import Method

BROKEN = (
    "a forward over this cache has failed half-way, so its layers have seen different tokens;"
    " reset() it and begin anew"
)


class Run(Generation):
    """A patched model. It creates caches, counts, and restores the model.

    Attributes:
        inner_name: the user's own attention implementation.
        meter: counts over all caches of this run.
    """

    meter_class: ClassVar[type[Meter]] = Meter

    @outlasting
    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        *,
        linear_rows: bool = True,
        kv: str = "model",
        kv_rotate: bool | None = None,
    ) -> None:
        model = unwrapped(model)
        if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
            raise TypeError(
                "kvcomp.patch: model: expected a transformers model that can generate, got"
                f" {type(model).__name__}"
            )
        expected = "a kvcomp method such as Delta()"
        require(isinstance(method, Method), "kvcomp.patch: method", expected, method, TypeError)
        flag = isinstance(linear_rows, bool)
        require(flag, "kvcomp.patch: linear_rows", "True or False", linear_rows, TypeError)
        refuse(model)
        self.model: Any = model  # of two types, PreTrainedModel and GenerationMixin
        self.method = method
        self.config = model.config.get_text_config(decoder=True)
        self.decoder = decoder_of(model)
        self.wrapper = Wrapper(model, self.decoder)
        self.inner_name = self.config._attn_implementation
        self.inv_freq = key_rotation(model) if method.moves_keys else None
        self.eight_bits = eight_bits(model, kv, kv_rotate)
        first = Cache(self.config, method, None, self.inv_freq)
        self._refuse(first)
        self.meter = self.meter_class(len(first.kv.layers))
        self._decode_seconds = 0.0
        self._decoded_before = 0
        self._last_forward: float | None = None  # when the latest forward ended
        self._running = threading.local()
        self._gate = Gate(self._take_back)
        self._undo: list[Callable[[], object]] = []
        self._linear, self._norms, self._rotations = LinearLayers(), 0, 0
        try:
            self._apply()
            if linear_rows:
                self._linear, undo = speed_up(model)
                self._undo.append(undo)
                self._norms, undo = speed_up_norms(model)
                self._undo.append(undo)
                self._rotations, undo = speed_up_rotations(model)
                self._undo.append(undo)
        except BaseException:
            self.undo()
            raise

    @property
    def current(self) -> Cache | None:
        """The cache of the forward running in this thread."""
        return getattr(self._running, "cache", None)

    @current.setter
    def current(self, cache: Cache | None) -> None:
        self._running.cache = cache

    @property
    def latest(self) -> Cache | None:
        """The cache of the latest forward in this thread, if it still exists; under Delethink the
        cache of its context."""
        return getattr(self._running, "latest", lambda: None)()

    @property
    def trying(self) -> bool:
        """Whether the forward running in this thread is a trial, whose tokens are dropped."""
        return getattr(self._running, "trying", False)

    @trying.setter
    def trying(self, value: bool) -> None:
        self._running.trying = value

    @property
    def encoding(self) -> bool:
        """Whether the forward running in this thread fills a cache and decodes nothing."""
        return False

    def new_cache(self) -> TransformersCache:
        """A new cache of this run, for your own decoding loops."""
        return self._new_context()

    def _new_context(self) -> Cache:
        """The cache that the model's layers use."""
        return Cache(self.config, self.method, self.meter, self.inv_freq, self.eight_bits)

    def report(self, layers: bool = False) -> Report:
        """The report of everything decoded so far; `layers=True` adds numbers per layer."""
        report = Report.of(self.method, self.meter, self._decode_seconds, layers)
        report.linear_rows_layers, report.other_linear_layers = self._linear
        report.norm_rows_layers, report.rotate_rows_layers = self._norms, self._rotations
        return report

    def undo(self) -> None:
        """Restore the model. Further calls do nothing.

        This waits for running forwards of other threads. A `generate` call that is still running
        gets a ValueError from its next forward. A call from within a forward takes effect when that
        forward ends.
        """
        self._gate.close()

    def _take_back(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __getstate__(self) -> dict:
        raise TypeError("kvcomp: a patched model cannot be copied or pickled; undo() the run first")

    def __enter__(self) -> Run:
        self._gate.require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def _refuse(self, first: Cache) -> None:
        """Raise ValueError if this kind of run cannot handle its model and method. `first` is a
        cache of that model."""

    def _apply(self) -> None:
        attention.register()
        config, decoder = self.config, self.decoder
        for module in attention_modules(decoder):
            module.__dict__["_kvcomp_run"] = self
            self._undo.append(partial(module.__dict__.pop, "_kvcomp_run"))
            if keeps_latents(module):
                module.__dict__["_kvcomp_latents"] = Latents(module)
                self._undo.append(partial(module.__dict__.pop, "_kvcomp_latents"))
                self._replace(module, EXPAND, as_stored)
        attention.RUNS[id(config)] = self
        self._undo.append(lambda: attention.RUNS.pop(id(config)))
        self._set_attention(attention.NAME)
        self._undo.append(lambda: self._set_attention(self.inner_name))
        self._replace(decoder, "forward", self._around(decoder.forward))
        for module in self.wrapper.modules:
            self._replace(module, "forward", self.wrapper.watched(module.forward, self._gate))
        self._enter_generate()

    def _replace(self, module: Module, name: str, function: Callable) -> None:
        """Replace a function of a module until the run is undone. If other code has replaced it
        again since, that function stays and keeps calling ours."""
        state = module.__dict__
        before = {name: state[name]} if name in state else {}
        state[name] = function

        def take_back() -> None:
            if state.get(name) is function:
                del state[name]
                state.update(before)

        self._undo.append(take_back)

    def _set_attention(self, name: str) -> None:
        part: Any = self.decoder if self.wrapper.modules else self.model  # other towers keep theirs
        part.set_attn_implementation(name)
        if self.config._attn_implementation != name:
            raise ValueError(
                f"kvcomp.patch: {type(self.model).__name__} does not take its attention from"
                " transformers' AttentionInterface"
            )

    def _around(self, forward: Callable) -> Callable:
        """The decoder's forward, with the work of the run before and after it. Unlike a forward
        hook, the work after it also runs when Ctrl-C has ended the forward."""
        names = inspect.signature(forward).parameters

        @wraps(forward)
        def around(*args: Any, **given: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | given
            if torch.compiler.is_compiling():
                return self._forward(forward, given)
            with self._gate.forward(may_wait=not self.encoding) as goes_on:
                return self._forward(forward, given) if goes_on else forward(**given)

        return around

    def _forward(self, forward: Callable, given: dict) -> Any:
        try:
            given = self._before_forward(given)
            with without_checkpoints(self.decoder):
                output = forward(**given)
            self._check_layers()
        except BaseException:
            self._failed()
            raise
        return self._after_forward(output)

    @outlasting
    def _before_forward(self, given: dict) -> dict:
        """Supply the cache and find the padding among the new tokens."""
        self._check_attention()
        if given.get("output_attentions") or self.config.output_attentions:
            raise ValueError(
                "kvcomp: output_attentions: expected False, as the kernels never store weights"
            )
        given = without_cache(self.decoder, given)
        cache = given.get("past_key_values")
        if cache is None and (
            self.config.use_cache if given.get("use_cache") is None else given["use_cache"]
        ):
            cache = given["past_key_values"] = self.new_cache()
        self.current = None
        if cache is not None:
            cache, given = self._enter(cache, self.wrapper.decode(given))
            if cache.broken:
                raise ValueError(f"kvcomp: past_key_values: {BROKEN}")
            tokens: Any = given.get("input_ids")
            tokens = given.get("inputs_embeds") if tokens is None else tokens
            mask = given.get("attention_mask")
            self._read(cache, self.wrapper.ids_of(given))
            cache.padding = self._new_padding(cache, mask, tokens.shape[1])
            cache.masks = [mask]
            cache.entered = True
            self.current = cache
        if self._last_forward is None:
            self._last_forward = time.perf_counter()
        return given

    def _check_attention(self) -> None:
        if self.config._attn_implementation != attention.NAME:
            raise ValueError(
                "kvcomp: the model's attention implementation was set to"
                f" {self.config._attn_implementation!r} while it is patched; undo() the run, set"
                " it, and patch again"
            )

    def _enter(self, cache: Any, given: dict) -> tuple[Cache, dict]:
        """The cache that the layers use in this forward, and the arguments that go with it."""
        self._check_cache(cache)
        return cache, given

    def _new_padding(self, cache: Cache, mask: Any, count: int) -> Tensor | None:
        """[B, count] bool, True for valid new tokens; None if all are valid."""
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

    def _check_layers(self) -> None:
        """Raise ValueError if a managed layer has stored tokens without attending through kvcomp,
        or has been skipped."""
        if self.current is None:
            return
        name = type(self.model).__name__
        for layer in self.current.layers:
            if isinstance(layer, Layer) and layer.fresh is not None:
                raise ValueError(
                    f"kvcomp: {name}: layer {layer.kv.position} of those with full attention has"
                    " stored K and V, and its attention was not kvcomp's: the model computes it"
                    " itself, or the layer was set to another implementation"
                )
        if len({kv.seen_and_staged for kv in self.current.kv.layers}) > 1:
            raise ValueError(f"kvcomp: {name} {SKIPS}")
        if not self.encoding:
            self.wrapper.check(self.current.masks)

    def _after_forward(self, output: Any) -> Any:
        """Measure the time and return the output."""
        self._end_forward()
        decoded = self.meter.tokens_decoded
        self._clock(decoded > self._decoded_before)
        self._decoded_before = decoded
        return output

    def _failed(self) -> None:
        """Called when the forward has failed. Its cache can no longer be used."""
        if self.current is not None:
            self.current.broken = True
        self._end_forward()

    def _end_forward(self) -> None:
        """Release the cache, so that no other model can continue with it."""
        cache, self.current = self.current, None
        if cache is not None:
            cache.leave()
            if not self.encoding and not self.trying:
                self._running.latest = weakref.ref(cache)

    def _clock(self, decoding: bool) -> None:
        """Update the clock when a forward has ended."""
        if not decoding and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # once per prompt: its work is not decoding
        now = time.perf_counter()
        if decoding and self._last_forward is not None:
            self._decode_seconds += now - self._last_forward
        self._last_forward = now

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask function of `attention.NAME`, which is that of the user's implementation."""
        make = partial(ALL_MASK_ATTENTION_FUNCTIONS[self.inner_name], *args, **kwargs)
        if self.wrapper.running:
            return self.wrapper.makes(make, kwargs["q_length"])
        made = make()
        if self.current is not None:
            self.current.masks.append(made)
        return made
