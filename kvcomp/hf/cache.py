"""KVCache behind the cache interface of transformers 5.4 and later.

kvcomp replaces the cache layers with full attention. Sliding-window, linear and dummy layers keep
transformers' classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcomp.cache import KVCache, LayerCache, Meter
from kvcomp.cache.rows import EightBits
from kvcomp.hf.decoder import values_of
from kvcomp.hf.latent import latent_rank
from kvcomp.hf.layer import Layer
from kvcomp.hf.outlast import outlasting
from kvcomp.hf.packing import PackedDrafts, Packing
from kvcomp.hf.text import Text
from kvcomp.methods import Method

HYBRID = "LinearAttentionAndFullAttentionLayer"  # K and V beside the states of a linear layer
INDEXED = "DynamicIndexedLayer"  # K and V, and keys of an indexer
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
        config: PretrainedConfig,
        method: Method,
        meter: Meter | None = None,
        inv_freq: Tensor | None = None,
        eight_bits: EightBits | None = None,
    ) -> None:
        layers = list(DynamicCache(config=config).layers)
        positions = values_of(config, "max_position_embeddings")
        managed = [index for index, layer in enumerate(layers) if _is_full(layer, positions)]
        kinds = {type(layer).__name__ for layer in layers}
        if INDEXED in kinds:
            raise ValueError(
                f"kvcomp: {type(config).__name__} has layers that choose the tokens of every step"
                " by an indexer of their own (sparse attention, as in DeepSeek-V3.2), and keep its"
                f" keys in their cache: {INDEXED}"
            )
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
        self.packing: Packing | None = None  # of the prompts in the one row of the next forward
        self.packed_drafts: PackedDrafts | None = None  # the same for drafts
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
    def marks(self) -> bool:
        """Whether the running forward's tokens are not all valid, or lie in one row."""
        return self.padding is not None or self.packing is not None

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
        if any(map(is_linear, self.layers)):
            return "the model has linear layers, whose states cannot take tokens back"
        if self.kv.layers[0].is_shared:
            return "layers of the model share K and V"
        return self.kv.method.drafts_refused

    def stage(self, lengths: Sequence[int] | None = None) -> None:
        """Treat the tokens of the next forward as drafts. Each attends as its decode step would,
        and later forwards do not see them before `commit`. The first is the last sampled token.

            cache.stage()
            logits = model(torch.cat([last, drafts], 1), past_key_values=cache).logits
            cache.commit(1 + accepted)

        Args:
            lengths: the number of drafts of each row. The forward gets them in one row [1, N],
                without padding, and the positions of all. None: [B, m].

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
        if lengths is not None:
            if not self.all_managed or len(lengths) != self.rows or min(lengths) < 0:
                raise ValueError(
                    f"kvcomp: stage: lengths: expected {self.rows} numbers of drafts, in a model"
                    f" whose layers all belong to the method, got {list(lengths)}"
                )
            self.packed_drafts = PackedDrafts(lengths, self.kv.layers[0].seq_lens.device)
        self.staging = True
        for layer in self.layers:
            # In newer transformers a window keeps what it could give back only if it is told to.
            if not isinstance(layer, Layer) and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

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

    def drop_drafts(self) -> None:
        """Discard what a generation that was interrupted has staged."""
        self.staging, self.packed_drafts = False, None
        if self.kv.staged and not self.broken:
            self.discard()

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
            packed = self.packed_drafts
            self.drafts = ids if packed is None or ids is None else packed.rows(ids, 1)
        elif self.packing is not None:
            self.text.add(None if ids is None else self.packing.rows(ids, 1), 0)
        else:
            self.text.add(ids, self.columns)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; one may come several times."""
        for layer in self.layers:
            if is_linear(layer):
                cast("Any", layer).reorder_cache(indices)  # the same, for states
            else:
                cast("Any", layer).batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.rows, device=self.kv.layers[0].seq_lens.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def begin_anew(self) -> None:
        """Start again: prompt and output come in once more, as one prompt."""
        prompts = self.kv.method.prompts(self.kv)
        self.reset()
        self.kv.state.prompts = prompts

    def leave(self) -> None:
        """Called when the forward that uses the cache is over."""
        self.entered, self.padding, self.staging = False, None, False
        self.packing = self.packed_drafts = None
        self.masks.clear()
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.fresh = layer.shared = layer.context = None

    def layer_of(self, index: Any, key: Tensor) -> Any:
        """The layer that an attention module attends to, with its number in the model. A module
        that serves several (Zamba2, HRM) attends to the one that has handed out K."""
        own = self.layers[-1 if index is None else index]
        if isinstance(own, Layer) and own.fresh is not None and own.fresh[0] is key:
            return own
        for layer in self.layers:
            if isinstance(layer, Layer) and layer.fresh is not None and layer.fresh[0] is key:
                return layer
        return own

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


def _is_full(layer: Any, positions: list[int]) -> bool:
    """Whether a layer attends to every token, which includes windows that are never full."""
    if type(layer).__name__ == "DynamicSlidingWindowLayer":
        return bool(positions) and getattr(layer, WINDOW) >= max(positions)
    return type(layer) is DynamicLayer or type(layer).__name__ == HYBRID


def is_linear(layer: Any) -> bool:
    """Whether a layer holds the states of a linear layer. Older transformers have no such class."""
    return any(kind.__name__ == "LinearAttentionCacheLayerMixin" for kind in type(layer).__mro__)


def is_dummy(layer: Any) -> bool:
    """Whether a layer has no K and V of its own: it attends to another's, or not at all."""
    return type(layer).__name__ == "DummyLayer"


def _same(mask: Tensor, known: Any) -> bool:
    if not isinstance(known, Tensor) or mask.shape != known.shape:
        return False
    return mask.device != known.device or mask.data_ptr() == known.data_ptr()
