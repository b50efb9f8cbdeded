"""KVCache behind the cache interface of transformers 5.4 and later.

kvcomp replaces the cache layers with full attention. Sliding-window, linear and dummy layers keep
transformers' classes.
"""

from __future__ import annotations

import inspect
import weakref
from copy import deepcopy
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from kvcomp.cache import KVCache, LayerCache, Meter
from kvcomp.cache.rows import EightBits, Rows
from kvcomp.hf.decoder import values_of
from kvcomp.hf.latent import latent_rank
from kvcomp.hf.outlast import outlasting
from kvcomp.hf.text import Text
from kvcomp.methods import Method

CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters  # before 5.15
SKIPS = "the model leaves out layers in some of its forwards, so that they see different tokens"
HYBRID = "LinearAttentionAndFullAttentionLayer"  # K and V beside the states of a linear layer
# Cache layers of transformers that keep its own attention.
KNOWN = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    HYBRID,
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
WINDOW = "sliding_window"
Context = tuple[Rows, Tensor]  # and the tokens of each row, see `Method.context`


class Layer(CacheLayerMixin):
    """One managed layer: lengths are logical here (tokens seen), physical in `kv`."""

    is_sliding = False
    is_compileable = False
    can_crop: ClassVar[bool] = True  # where the method can

    def __init__(self, owner: Cache, kv: LayerCache, window: int | None = None) -> None:
        super().__init__()
        self.own(owner)
        self.kv = kv
        self.is_croppable = self.can_crop and kv.cache.method.croppable
        self.window = window  # of a sliding layer that covers all positions of the model
        self.fresh: tuple[Tensor, Tensor] | None = None  # returned by `update`, not attended to yet
        self.shared: tuple[Tensor, Tensor] | None = None  # the same, for layers that share them
        self.context: Context | None = None  # what several new tokens have attended to

    def own(self, owner: Cache) -> None:
        """Like `LayerCache.own`."""
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> Cache:
        owner = self._owner()
        if owner is None:
            raise ReferenceError("kvcomp: the cache of this layer is gone; keep a reference to it")
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return only them. The attention function reads `kv` itself.

        Raises:
            ValueError: the model is not the patched one, so its attention would not read `kv`.
        """
        if not self.owner.entered:
            raise ValueError(
                "kvcomp: past_key_values: expected the model that this cache was made for, while it"
                " is patched (this run may have been undone); another model would see only the"
                " newest tokens"
            )
        self.is_initialized = True
        fresh = _as_attended(key_states), _as_attended(value_states)
        self._keep(*fresh)
        if not torch.compiler.is_compiling():
            below = self.kv.cache.layers[max(self.kv.position - 1, 0)]
            if (
                below.seen_and_staged != self.kv.seen_and_staged
            ):  # before the method uses all layers
                raise ValueError(f"kvcomp: {SKIPS}")
            if self.window is not None and self.kv.seen_and_staged > self.window:
                raise ValueError(
                    f"kvcomp: the model's window of {self.window} tokens is full, from where on its"
                    " layers would no longer attend to all"
                )
        self.fresh = fresh
        if self.kv.is_shared:
            self.shared = fresh
        return fresh

    @outlasting
    def _keep(self, key: Tensor, value: Tensor) -> None:
        if self.owner.staging:
            self.kv.stage(key, value)
        else:
            self.kv.append(key, value, self.owner.padding)

    @property
    def keys(self) -> Tensor:
        raise ValueError(
            "kvcomp: cache.layers[i].keys and .values: a layer of kvcomp keeps what its method"
            " says, in an order of its own; see .kv.keys, .kv.values and .kv.seq_lens, and"
            " .kv.positions(...) for the places of the tokens"
        )

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """transformers sets it to None at first."""

    values = keys

    def get_seq_length(self) -> int:
        return self.kv.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.13
        return -1

    def reset(self) -> None:
        self.is_initialized = False
        self.kv.reset()

    @outlasting
    def crop(self, tokens: int) -> None:
        """Take back the last `-tokens` tokens, padding included. Staged tokens go first, others
        exactly.

        With transformers before 5.15 a positive number is the new length.

        Raises:
            ValueError: a positive number, with transformers 5.15 or later; more tokens than there
                are; a method that cannot take tokens back.
        """
        count = taken_back(tokens, self.kv.seen_and_staged)
        if self.kv.position == 0:  # the cache crops all of its layers at once
            if self.kv.staged:
                self.owner.accept(self.kv.staged - count)
            elif count:
                self.kv.cache.crop(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv.filled:
            rows = torch.arange(self.kv.seq_lens.shape[0], device=self.kv.seq_lens.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @outlasting
    def batch_select_indices(self, indices: Tensor) -> None:
        self.owner.require_settled()
        self.kv.select(indices)
        if self.kv.position == 0:
            self.owner.text.select(indices)

    def offload(self) -> None:
        raise RuntimeError("kvcomp: this cache does not support whole-layer offloading")

    prefetch = offload


class Cache(TransformersCache):
    """A transformers cache whose full-attention layers belong to a kvcomp method.

    Args:
        config: config of the model; its text part is used.
        method: the method that decides what to attend to and what to keep.
        meter: the counts, shared by the caches of one run.
        inv_freq: the rotation of the model's keys, see `kvcomp.hf.rotation`.
        eight_bits: how K and V are kept in eight bits; None: as the model makes them.

    Raises:
        ValueError: no full-attention layer in the model, or parameters that do not fit its depth.
    """

    layer_class: ClassVar[type[Layer]] = Layer

    @outlasting
    def __init__(
        self,
        config,
        method: Method,
        meter: Meter | None = None,
        inv_freq: Tensor | None = None,
        eight_bits: EightBits | None = None,
    ) -> None:
        layers = list(DynamicCache(config=config).layers)
        positions = values_of(config, "max_position_embeddings")
        managed = [index for index, layer in enumerate(layers) if _is_full(layer, positions)]
        kinds = {type(layer).__name__ for layer in layers}
        if unknown := ", ".join(sorted(kinds - KNOWN)):
            raise ValueError(
                f"kvcomp: {type(config).__name__} has layers that attend in a way of their own, and"
                f" with caches of their own: {unknown}"
            )
        if not managed:
            raise ValueError(
                f"kvcomp: {type(config).__name__} has no full-attention layer to manage: its cache"
                f" layers are {', '.join(sorted(kinds))}"
            )
        rank = latent_rank(config)
        self.kv = self._new_kv(method, len(managed), meter, inv_freq, rank, eight_bits)
        for kv, index in zip(self.kv.layers, managed, strict=True):
            layers[index] = self._new_layer(kv, layers[index])
        self.all_managed = all(type(layer) is self.layer_class for layer in layers)
        for kv in self.kv.layers:
            kv.is_shared = any(map(is_dummy, layers))
        self.padding: Tensor | None = None  # [B, n] bool: valid tokens of the running forward
        self.masks: list[Any] = []  # attention masks that the forward got or made
        self.entered = False  # whether a forward of the patched model is using it
        self.broken = False  # whether a forward has failed halfway
        self.staging = False  # whether the next forward's tokens, or the running one's, are drafts
        self.drafts: Tensor | None = None  # [B, m] ids of those that are staged
        self.text = Text()
        super().__init__(layers=layers)

    @outlasting
    def __deepcopy__(self, memo: dict) -> Cache:
        copy = memo[id(self)] = object.__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        for layer in copy.layers:
            if isinstance(layer, Layer):
                layer.own(copy)
        return copy

    def _new_layer(self, kv: LayerCache, replaced: Any) -> Layer:
        if type(replaced).__name__ == HYBRID:
            from kvcomp.hf.hybrid_layer import HybridLayer  # older transformers have no such layers

            return HybridLayer(self, kv, replaced.number_of_states)
        return self.layer_class(self, kv, getattr(replaced, WINDOW, None))

    def _new_kv(self, *args) -> KVCache:
        return KVCache(*args)

    @property
    def meter(self) -> Meter:
        return self.kv.meter

    @property
    def columns(self) -> int:
        """Columns of the batch seen, padding included; a lower bound if steps ran without the
        host."""
        return self.kv.layers[0].columns

    @property
    def rows(self) -> int:
        """The number of sequences; 0 before the first tokens."""
        first = self.kv.layers[0]
        return len(first.seq_lens) if first.filled else 0

    @outlasting
    def reset(self) -> None:
        super().reset()
        self.kv.reset()
        self.broken = self.staging = False
        self.drafts = None
        self.text = Text()

    @property
    def room(self) -> float:
        """The number of tokens that may be accepted at once, see `KVCache.room`."""
        return self.kv.room

    @property
    def drafts_refused(self) -> str | None:
        """The reason why drafts cannot be checked over this cache; None: they can."""
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
            return "the model has linear layers, whose states cannot take tokens back"
        return self.kv.method.drafts_refused

    def stage(self) -> None:
        """Treat the tokens of the next forward as drafts. Each attends as its decode step would,
        and later forwards do not see them before `commit`. The first is the last sampled token.

            cache.stage()
            logits = model(torch.cat([last, drafts], 1), past_key_values=cache).logits
            cache.commit(1 + accepted)

        Raises:
            ValueError: the method, or a layer that it does not manage, cannot handle drafts.
        """
        if (reason := self.drafts_refused) is not None:
            raise ValueError(
                f"kvcomp: {type(self.kv.method).__name__} cannot check several tokens at once:"
                f" {reason}"
            )
        if not self.rows:
            raise ValueError("kvcomp: stage: expected a cache that has seen the prompt")
        self.staging = True

    @outlasting
    def commit(self, counts: int | Tensor) -> None:
        """Keep the first `counts` staged tokens of each row as if they had been decoded one by one,
        and drop the others.

        Args:
            counts: a number, or [B] integers if rows differ.

        Raises:
            ValueError: see `KVCache.commit`; different counts in a model with layers that use
                transformers' cache. Nothing has changed.
        """
        if self.all_managed:
            return self.accept(counts)
        given = set(counts.tolist() if isinstance(counts, Tensor) else [counts])
        if len(given) > 1:
            raise ValueError(
                "kvcomp: commit: layers of this model have a cache of transformers', where rows"
                f" cannot differ; got {counts}"
            )
        count, staged = given.pop(), self.kv.staged
        self.accept(count)
        for layer in self.layers:
            if not isinstance(layer, Layer):
                cast("Any", layer).crop(count - staged)
        return None

    def discard(self) -> None:
        """Drop the staged tokens."""
        self.commit(0)

    def require_settled(self) -> None:
        """Raise ValueError if staged tokens wait for `commit`."""
        if self.kv.staged:
            raise ValueError("kvcomp: staged tokens wait for commit() or discard()")

    def accept(self, counts: int | Tensor) -> None:
        """`commit` for the managed layers."""
        first, ids = self.columns, self.drafts
        self.kv.commit(counts)
        self.drafts = None
        if self.columns > first:
            self.text.add(None if ids is None else ids[:, : self.columns - first], first)

    def read(self, ids: Tensor | None) -> None:
        """Note tokens [B, n] that come in; None: embeddings."""
        self.require_settled()
        if self.staging:
            self.drafts = ids
        else:
            self.text.add(ids, self.columns)

    def begin_anew(self) -> None:
        """Start again: prompt and output come in once more, as one prompt."""
        prompts = self.kv.method.prompts(self.kv)
        self.reset()
        self.kv.state.prompts = prompts

    def leave(self) -> None:
        """Called when the forward that uses the cache is over."""
        self.entered, self.padding, self.staging = False, None, False
        self.masks.clear()
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.fresh = layer.shared = layer.context = None

    def source(self, key: Tensor) -> Layer | None:
        """The layer of ours that has handed out K in the running forward, for one that has none."""
        for layer in self.layers:
            if isinstance(layer, Layer) and layer.shared is not None and layer.shared[0] is key:
                return layer
        return None

    def gives(self, mask: Any) -> bool:
        """Whether the running forward got or made this attention mask. Such a mask says no more
        than the cache knows; a mask changed by a layer may."""
        return mask is None or any(_same(mask, known) for known in self.masks)


def taken_back(tokens: int | Tensor, there: int) -> int:
    """How many of the tokens that are there `crop(tokens)` takes back; see `Layer.crop`."""
    tokens = int(tokens)  # some versions pass a tensor
    if tokens > 0 and not CROPS_TO_LENGTH:
        raise ValueError(
            f"kvcomp: crop: expected minus the number of tokens to take back, got {tokens}"
        )
    return -tokens if tokens <= 0 else max(there - tokens, 0)


def _is_full(layer: Any, positions: list[int]) -> bool:
    """Whether a layer attends to every token, which includes windows that are never full."""
    if type(layer).__name__ == "DynamicSlidingWindowLayer":
        return bool(positions) and getattr(layer, WINDOW) >= max(positions)
    return type(layer) is DynamicLayer or type(layer).__name__ == HYBRID


def is_dummy(layer: Any) -> bool:
    """Whether a layer has no K and V of its own: it attends to another's, or not at all."""
    return type(layer).__name__ == "DummyLayer"


def _same(mask: Tensor, known: Any) -> bool:
    if not isinstance(known, Tensor) or mask.shape != known.shape:
        return False
    return mask.device != known.device or mask.data_ptr() == known.data_ptr()


def _as_attended(x: Tensor) -> Tensor:
    """K or V in the dtype that attention sees under autocast. Models with fp32 weights pass K in
    fp32, because their rotation makes it so, and V in 16 bits."""
    kind = x.device.type
    if x.dtype == torch.float64 or not _autocasts(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
