"""Static caches: memory of a fixed size, with lengths that are only in tensors.

A decode step then does the same work on the same addresses at any length, so one compiled graph or
CUDA graph serves all steps. The host counts columns and steps itself (`seen`, `steps`) and may
evict tokens between two steps. The reads of a step are counted on the device (`StaticMeter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp._torch import keep_address
from kvcomp.cache.kv_cache import KVCache, Policy
from kvcomp.cache.latent import LatentLayer
from kvcomp.cache.later import forget, known, later
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.ring import StaticRing
from kvcomp.cache.rows import WORDS, EightBits
from kvcomp.cache.static_meter import Sizes, StaticMeter
from kvcomp.cache.view import Layer
from kvcomp.ops.decode_attention import logits_dtype


class StaticLayerCache(LayerCache):
    """K and V of one layer: [B, Hkv, capacity, D] each.

    If no tokens leave, `capacity` is `max_tokens` and `logical_lens` is `seq_lens`. If the method
    sets a bound (`limit`), `capacity` is max(prompt, budget) + window; only a later, longer prompt
    moves the tokens to larger memory. `max_len` equals `capacity` once there are tokens. `reset`
    keeps the memory for sequences that fit, so addresses outlive a batch.
    """

    # Kept between sequences: k, v, seq_lens, and logical_lens if it is another tensor.
    _slab: tuple[Tensor, ...] = later("the first append")
    _words: Tensor = later("the first append")  # of K and V in eight bits

    if TYPE_CHECKING:

        @property
        def cache(self) -> StaticKVCache: ...

    def __init__(self, cache: StaticKVCache, position: int) -> None:
        self._remembered: dict[str, Tensor] = {}
        super().__init__(cache, position)

    def reset(self) -> None:
        super().reset()
        self.max_len = self.cache.max_tokens
        self._uniform = False  # as far as the host knows

    def limit(self, budget: int, window: int) -> None:
        super().limit(budget, window)
        if self.allocated:
            self._fit(budget)

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Add n tokens to every row, like `LayerCache.append`. The caller checks the room."""
        k, v = self._as_kept(k.detach(), v.detach())
        self._check(k, v, valid)
        self.first = not self.filled
        if self.first:
            self._open(k, v)
        elif self._most is not None and k.shape[2] > 1:
            self._fit(int(self.seq_lens.max()) + k.shape[2])
        self.added = self._put(self._encoded(k, v), valid)
        if self.position == 0:
            self.cache.columns.add_(k.shape[2])

    def repeat_heads(self, heads: int) -> None:
        if heads == self._k.shape[1]:  # the memory has repeated heads from earlier sequences
            return
        super().repeat_heads(heads)
        self._bind((self._k, self._v, *self._slab[2:]))
        self._keep_words()

    def remember(self, name: str, note: Tensor) -> Tensor:
        """Like `LayerCache.remember`, in the memory of earlier sequences if it fits."""
        have = self._remembered.get(name)
        if have is not None and (have.shape, have.device) == (note.shape, note.device):
            note = have.copy_(note)
        self._remembered[name] = note
        keep_address(note)
        return super().remember(name, note)

    def select(self, rows: Tensor) -> None:
        """Rows become `rows` ([B'] int64 indices), in place if their number does not change."""
        if not self.filled:
            return
        rows, self._accepted = rows.to(self._k.device), None
        if len(rows) == len(self.seq_lens):
            placed = [self._placed] if known(self, "_placed") else []
            for tensor in (*self._slab, *self.state.values(), *self.slots.values(), *placed):
                tensor.copy_(tensor[rows])
            return
        self._bind(tuple(tensor[rows] for tensor in self._slab))
        self.slots = {name: tensor[rows] for name, tensor in self.slots.items()}
        self._keep_words()
        self.state = {name: tensor[rows] for name, tensor in self.state.items()}
        for name in self._remembered.keys() & self.state.keys():
            self.remember(name, self.state[name])
        if known(self, "_placed"):
            self._placed = self._placed[rows]

    def shows(self, mask: Tensor) -> bool:
        """Compares the number of tokens per row; a static cache does not know their columns."""
        return torch.equal(mask.sum(1).int(), self.logical_lens.to(mask.device))

    def _open(self, k: Tensor, v: Tensor) -> None:
        """Prepare memory for new sequences: the memory of earlier ones if it fits."""
        room = self._room(k.shape[2])
        batch, heads, _, dim = k.shape
        if known(self, "_slab"):
            self._copies = self._slab[0].shape[1] // heads
        heads *= self._copies
        shapes = [(batch, heads, room, width) for width in (dim, v.shape[3])]
        self._dtype = k.dtype
        dtype = k.dtype if self.eight_bits is None else torch.int8
        if known(self, "_slab") and all(
            _has_room(memory, shape, dtype, k.device)
            for memory, shape in zip(self._slab, shapes, strict=False)
        ):
            slab = self._slab
        else:
            forget(self, "_slab")  # before there is more
            # Zeros, because a mask does not stop the NaN that memory never written may hold.
            lens = torch.zeros(batch, dtype=torch.int32, device=k.device)
            both = (lens,) if self._most is None else (lens, lens.clone())
            slab = *(k.new_zeros(shape, dtype=dtype) for shape in shapes), *both
            forget(self, "_words")
        self._bind(slab)
        if self.eight_bits is not None:
            self.slots[WORDS] = self._words if known(self, "_words") else self.track(WORDS, heads)
            self._keep_words()
        for lens in slab[2:]:
            lens.zero_()
        self._count_bytes()
        if self.position == 0:
            self.cache.open(k.device)

    def _room(self, longest: int) -> int:
        """Slots that rows of up to `longest` tokens need until the next eviction."""
        if self._most is None:
            return self.cache.max_tokens
        budget, window = self._most
        return min(max(longest, budget) + window, self.cache.max_tokens)

    def _fit(self, longest: int) -> None:
        if (room := self._room(longest)) > self.capacity:
            self._resize(room)
            self._bind((self._k, self._v, *self._slab[2:]))
            self._keep_words()

    def _keep_words(self) -> None:
        """For the next sequences, too."""
        if self.eight_bits is not None:
            self._words = self.slots[WORDS]
            keep_address(self._words)

    def _shrink(self, longest: int) -> None:
        """Do nothing: memory and `max_len` stay."""

    def _bind(self, slab: tuple[Tensor, ...]) -> None:
        self._slab = slab
        self._k, self._v, self.seq_lens = slab[:3]
        self.logical_lens, self.max_len = slab[-1], self.capacity
        for tensor in slab:
            keep_address(tensor)


def _has_room(
    memory: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether `memory` has that shape, or more slots, and that dtype and device."""
    batch, heads, slots, dim = memory.shape
    same = (batch, heads, dim) == (shape[0], shape[1], shape[3]) and slots >= shape[2]
    return same and (memory.dtype, memory.device) == (dtype, device)


class StaticLatentLayer(LatentLayer, StaticLayerCache):
    """Rows of latents (MLA) in memory of a fixed size."""


class StaticKVCache(KVCache):
    """The layers of one batch, with room for `max_tokens` columns (padding included).

    Attributes:
        max_tokens: the largest number of columns.
        columns: [] int64, columns seen, on the device.
        seen: columns seen, counted on the host: exact after a prompt, later a lower bound. Steps
            that run without the host, such as graph replays, are counted only inside `step`.
            Methods that evict need that.
        sizes: bytes per token, see `StaticMeter`.
    """

    layer_class = StaticLayerCache
    latent_class = StaticLatentLayer
    meter: StaticMeter

    def __init__(
        self,
        method: Policy,
        num_layers: int,
        meter: StaticMeter,
        max_tokens: int,
        rank: int | None = None,
        eight_bits: EightBits | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.columns = torch.zeros((), dtype=torch.int64)
        self.sizes: Sizes = (0, 0, 0)
        self._ring: StaticRing | None = None  # also between sequences
        super().__init__(method, num_layers, meter, rank=rank, eight_bits=eight_bits)

    def reset(self) -> None:
        """Forget the sequences and keep the memory."""
        self.meter.settle()  # what they had in use in the end
        super().reset()
        self.columns.zero_()
        self.seen = 0

    def open(self, device: torch.device) -> None:
        """Start to count the columns and reads of new sequences on `device`."""
        self.columns = self.columns.to(device)
        keep_address(self.columns)
        self.meter.count_on(device)

    def enter(self, count: int) -> None:
        """Announce `count` more columns.

        Raises:
            ValueError: they do not fit. Nothing has changed.
        """
        if count > 1:  # once per prompt
            self.seen = int(self.columns)
        if self.seen + count > self.max_tokens:
            raise ValueError(
                f"kvcomp: the cache holds {self.seen} tokens and {count} more do not fit into"
                f" patch(max_tokens={self.max_tokens})"
            )
        self.seen += count
        for layer in self.layers:
            layer.columns = self.seen

    def leave(self) -> None:
        """Called after a decode step, for the host's decisions between two steps."""
        self.steps += 1
        self.method.between_steps(self)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for one decode step that calls `enter` and `leave`."""
        self.enter(1)
        yield
        self.leave()

    def ring(self, size: int) -> StaticRing:
        if self._ring is None or self._ring.row.device != self.columns.device:
            self._ring = StaticRing(size, self.columns.device)
        return self._ring

    def logits_for(self, layer: Layer, q: Tensor) -> Tensor:
        """Like `KVCache.logits_for`, but from the graph's own memory."""
        dtype = logits_dtype(q)
        self.meter.logit_bytes = q.shape[1] * dtype.itemsize
        return q.new_empty(*q.shape[:2], layer.capacity, dtype=dtype)

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        out = self.method.attend(layer, q, scale)
        if layer.position == len(self.layers) - 1:
            self.meter.stepped(self)
            self.method.end_step(self)
        return out

    def crop(self, count: int) -> None:
        raise ValueError("kvcomp: crop: a static cache cannot take tokens back")
