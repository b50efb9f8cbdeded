"""Who decodes: a model and a cache that stands at a given context without a prefill."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

import kvcomp
from decode.models import token_bytes, twin
from harness.kv import parted
from kvcomp import METHODS, Delethink, Method
from kvcomp.hf import Cache, Run, StaticRun
from kvcomp.methods.eviction import Eviction
from retrieval.common import now

STOCK, STATIC = "hf dynamic", "hf static"
COMPILED = {"full-compiled": False, "full-frozen": True}  # whether inductor packs weights
OURS = ("full", "delta", "lazy-eviction", "louis-kv", "delethink")


@dataclass(frozen=True)
class Filling:
    """Random K and V of one layer, taken for all; `ids` have one token more."""

    keys: Tensor  # [B, Hkv, n, D]
    values: Tensor
    query: Tensor  # [B, Hq, 1, D]
    ids: Tensor  # [B, n + 1]

    @classmethod
    def make(cls, model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Filling:
        config = model.config
        dim = model.get_decoder().layers[0].self_attn.head_dim
        generator = torch.Generator(model.device).manual_seed(seed)

        def normal(heads: int, count: int) -> Tensor:
            shape = batch, heads, count, dim
            x = torch.randn(shape, generator=generator, device=model.device)
            return x.to(model.dtype)

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        keys, values = normal(kv_heads, tokens), normal(kv_heads, tokens)
        shape = batch, tokens + 1
        ids = torch.randint(1, 256, shape, generator=generator, device=model.device)
        return cls(keys, values, normal(heads, 1), ids)

    def first(self, tokens: int) -> Filling:
        keys, values = self.keys[:, :, :tokens], self.values[:, :, :tokens]
        return Filling(keys, values, self.query, self.ids[:, : tokens + 1])


class Clock(BaseStreamer):
    """Notes when `generate` hands tokens out."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, []

    def put(self, value: Tensor) -> None:
        self.seconds.append(now(self.device))

    def end(self) -> None:
        pass


class Contender:
    """Stock transformers, sdpa attention: a model and one of its caches.

    Attributes:
        layers: the cache that the model's layers call.
        parameters: what to know about it, for the table.
        divisible: whether the parts of a step can be timed.
    """

    divisible = True

    def __init__(
        self, name: str, model: PreTrainedModel, cache: DynamicCache | StaticCache, filling: Filling
    ) -> None:
        self.name, self.model, self.cache, self.layers = name, model, cache, cache
        self.filling, self.parameters = filling, type(cache).__name__
        self.device = model.device.type
        for layer in range(model.config.num_hidden_layers):
            cache.update(filling.keys, filling.values, layer)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """ids [B, 1] -> logits [B, 1, vocabulary]."""
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits

    @torch.inference_mode()
    def generate(self, count: int) -> list[float]:
        """Greedily, `count` tokens behind the filling; the clock after each of them."""
        ids, clock = self.filling.ids, Clock(self.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        return clock.seconds[1:]  # the first is of the prompt

    def counts(self) -> tuple[int, int]:
        """Selections from host memory so far, and bytes of K and V that attention had to read: 0,
        as they are known without counting."""
        return 0, 0

    def kv_bytes(self, counted: int) -> int:
        """That a step must read now, if `counted` were."""
        rows = len(self.filling.ids)
        return rows * int(self.cache.get_seq_length()) * token_bytes(self.model)

    def close(self) -> None:
        self.cache = self.layers = None


class Patched(Contender):
    """A method of ours, on a twin of the model.

    Args:
        label: of harness.kv; None: the method's name.
    """

    def __init__(
        self, method: Method, model: PreTrainedModel, filling: Filling, label: str | None = None
    ) -> None:
        self.name, self.parameters, self.method = label or method.name, repr(method), method
        self.model, self.device = twin(model), model.device.type
        self.run = self._patch(method)
        self.fill(filling)

    def fill(self, filling: Filling) -> None:
        """A new cache, which stands behind this filling."""
        self.filling, method = filling, self.method
        self.cache = self.layers = self._new_cache()
        if isinstance(method, Delethink):
            self.cache.enter({"input_ids": filling.ids[:, :-1]}, encode=lambda *args: None)
            self.layers = self.cache.context
        kv, scale = self.layers.kv, filling.query.shape[-1] ** -0.5
        with torch.no_grad():  # and not in inference mode, whose tensors the steps could not change
            for layer in kv.layers:
                layer.append(filling.keys, filling.values)
                kv.prefill(layer, filling.query, scale)
                layer.settle()
                if isinstance(method, Eviction):  # as it is in the long run
                    method.evict(layer)

    def _patch(self, method: Method) -> Run:
        return kvcomp.patch(self.model, method, kv=parted(self.name)[1])

    def _new_cache(self) -> Cache:
        return self.run.new_cache()

    def counts(self) -> tuple[int, int]:
        report = self.run.report()
        return report.retrievals, report.kv_bytes_read

    def kv_bytes(self, counted: int) -> int:
        return counted

    def close(self) -> None:
        self.run.undo()
        super().close()


class OneSize(Patched):
    """A method of ours on a cache with room for `room` tokens; see `patch(max_tokens=...)`."""

    def __init__(self, method: Method, model: PreTrainedModel, filling: Filling, room: int) -> None:
        self.room = room
        super().__init__(method, model, filling)

    def _patch(self, method: Method) -> StaticRun:
        return kvcomp.patch(self.model, method, max_tokens=self.room)

    def _new_cache(self) -> Cache:
        cache = self.run.new_cache()
        cache.kv.enter(self.filling.keys.shape[2])
        for layer in cache.layers:
            layer.is_initialized = True  # what a forward would have done
        return cache


class Compiled(OneSize):
    """Full attention whose step inductor has compiled, in the constructor.

    Args:
        freeze: see `run.compile`.
    """

    divisible = False  # a compiled step shows nothing of its parts

    def __init__(
        self, name: str, model: PreTrainedModel, filling: Filling, room: int, freeze: bool
    ) -> None:
        super().__init__(kvcomp.Full(), model, filling, room)
        self.name = name
        self._compiled = self.run.compile(fullgraph=True, freeze=freeze)
        self.step(filling.ids[:, -1:])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        return self._compiled(ids, past_key_values=self.cache).logits


def method_for(name: str, tokens: int, smoke: bool) -> Method:
    """As it would be used where `tokens` tokens have been seen."""
    if smoke:
        return METHODS[name].example(tokens // 2)
    fields = {
        "lazy-eviction": {"budget": tokens // 2},
        "louis-kv": {"iterations": 1},  # of the clustering, before anything is timed
        "delethink": {"max_chunks": None},
    }
    return METHODS[name](**fields.get(name, {}))


def context_of(method: Method, tokens: int, prompt: int) -> int:
    """Tokens of the context in which a method stands when `tokens` have been seen, of which
    `prompt` were the prompt: for Delethink, behind its first chunk, the middle of a chunk."""
    if not isinstance(method, Delethink) or tokens <= prompt + method.chunk:
        return tokens
    return prompt + method.chunk - (method.chunk - method.carry) // 2


def boundary_seconds(
    model: PreTrainedModel, filling: Filling, method: Delethink, prompt: int
) -> float:
    """How long it takes to encode a carry behind prompt and head: a piece in its middle, once, and
    as many of those as there are."""
    before = filling.first(prompt + method.head + method.tail // 2)
    patched = Patched(kvcomp.Full(), model, before)
    piece = filling.ids[:, : min(method.piece, method.tail)]
    with torch.inference_mode():
        start = now(patched.device)
        patched.model.get_decoder()(input_ids=piece, past_key_values=patched.cache)
        seconds = now(patched.device) - start
    patched.close()
    return seconds * method.tail / piece.shape[1]


def contender(
    name: str, model: PreTrainedModel, filling: Filling, room: int, options: argparse.Namespace
) -> Contender:
    """One that stands at the filling's last token and can decode `room` tokens more."""
    tokens = filling.keys.shape[2]
    if name == STOCK:
        return Contender(name, model, DynamicCache(config=model.config), filling)
    if name == STATIC:
        cache = StaticCache(config=model.config, max_cache_len=tokens + room)
        return Contender(name, model, cache, filling)
    if name in COMPILED:
        return Compiled(name, model, filling, tokens + room, COMPILED[name])
    method = method_for(parted(name)[0], tokens, options.smoke)
    part = filling.first(context_of(method, tokens, options.prompt))
    return Patched(method, model, part, name)
