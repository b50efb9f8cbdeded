"""Layer: one attention layer whose K and V a method keeps, behind the interface of transformers'
cache layers."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvcomp.cache import LayerCache
from kvcomp.cache.rows import Rows
from kvcomp.hf.outlast import outlasting

if TYPE_CHECKING:
    from kvcomp.hf.cache import Cache

CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters  # before 5.15
SKIPS = "the model leaves out layers in some of its forwards, so that they see different tokens"
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
        owner, kv = self.owner, self.kv
        if not owner.entered:
            raise ValueError(
                "kvcomp: past_key_values: expected the model that this cache was made for, while it"
                " is patched (this run may have been undone); another model would see only the"
                " newest tokens"
            )
        self.is_initialized = True
        fresh = _as_attended(key_states, value_states)
        count = key_states.shape[2]
        if owner.staging or owner.marks or not kv.has_room(count):
            self._keep(*fresh)
        else:  # nothing new outlasts this call
            kv.append(*fresh)
        if not torch.compiler.is_compiling():
            seen, below = kv.seen_and_staged, kv.cache.layers[max(kv.position - 1, 0)]
            if below.seen_and_staged != seen:  # before the method uses all layers
                raise ValueError(f"kvcomp: {SKIPS}")
            if self.window is not None and seen > self.window:
                raise ValueError(
                    f"kvcomp: the model's window of {self.window} tokens is full, from where on its"
                    " layers would no longer attend to all"
                )
        self.fresh = fresh
        if kv.is_shared:
            self.shared = fresh
        return fresh

    @outlasting
    def _keep(self, key: Tensor, value: Tensor) -> None:
        owner = self.owner
        if owner.staging:
            drafts = owner.packed_drafts
            if drafts is None:
                self.kv.stage(key, value)
            else:
                self.kv.stage(drafts.rows(key, 2), drafts.rows(value, 2), drafts.lens)
        else:
            packing, valid = owner.packing, owner.padding
            if packing is not None:
                key, value, valid = packing.rows(key, 2), packing.rows(value, 2), packing.valid
            self.kv.append(key, value, valid)

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


def taken_back(tokens: int | Tensor, there: int) -> int:
    """How many of the tokens that are there `crop(tokens)` takes back; see `Layer.crop`."""
    tokens = int(tokens)  # some versions pass a tensor
    if tokens > 0 and not CROPS_TO_LENGTH:
        raise ValueError(
            f"kvcomp: crop: expected minus the number of tokens to take back, got {tokens}"
        )
    return -tokens if tokens <= 0 else max(there - tokens, 0)


def _as_attended(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """K and V in the dtype that attention sees under autocast. Models with fp32 weights pass K in
    fp32, because their rotation makes it so, and V in 16 bits."""
    if key.is_cpu and not torch.is_autocast_enabled("cpu"):
        return key, value
    kind = key.device.type
    if not _autocasts(kind):
        return key, value
    dtype = torch.get_autocast_dtype(kind)
    key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (key, value))
    return key, value


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
