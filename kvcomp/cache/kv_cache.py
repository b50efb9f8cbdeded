"""KVCache: the layers of one batch of sequences and the method that manages them."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvcomp.cache.latent import LatentLayer
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.meter import Meter
from kvcomp.cache.ring import HostRing, Ring
from kvcomp.cache.rows import EightBits, Rows
from kvcomp.cache.view import Layer
from kvcomp.ops.decode_attention import logits_dtype


class Policy(Protocol):
    """The hooks that a cache calls on its method. They are listed here because methods import
    caches and not the other way round. `kvcomp.methods.Method` explains them."""

    croppable: ClassVar[bool]
    in_step: ClassVar[bool]
    one_way: ClassVar[str]

    @property
    def attention(self) -> Policy: ...
    @property
    def dense_up_to(self) -> float: ...
    @property
    def drafts_refused(self) -> str | None: ...
    @property
    def notes_steps(self) -> bool: ...
    def check(self, num_layers: int) -> None: ...
    def start(self, cache: KVCache) -> None: ...
    def prefill(self, layer: LayerCache, q: Tensor) -> None: ...
    def context(self, layer: LayerCache) -> tuple[Rows, Tensor]: ...
    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor: ...
    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor: ...
    def accept(self, layer: LayerCache, index: int) -> None: ...
    def end_verify(self, cache: KVCache) -> None: ...
    def room(self, cache: KVCache) -> float: ...
    def end_step(self, cache: KVCache) -> None: ...
    def between_steps(self, cache: KVCache) -> None: ...
    def prompts(self, cache: KVCache) -> list[Tensor] | None: ...
    def rewind(self, cache: KVCache, columns: int) -> int: ...


class Notes:
    """A method's notes about a batch, by name. dynamo traces assignments to this class, but not to
    a SimpleNamespace."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class KVCache:
    """The managed layers of one batch, their method, and the notes of the method.

    Attributes:
        method: decides what each layer attends to and keeps.
        layers: one LayerCache per managed layer, in model order.
        state: the method's own notes on this batch; emptied by `reset`.
        steps: decode steps since the last `reset`.
        meter: counts for this cache; several caches may share it.
        inv_freq: [R / 2] fp32, radians per position by which the model rotates its keys, for
            methods that move keys to other positions; None if they are not known.
        eight_bits: how K and V are kept in eight bits; None: as the model makes them.
        folded: tokens of earlier contexts that each row has dropped.
        beside: other caches with a context of the same sequences; they are counted with this one.
        counted: False for those other caches.

    With `rank` the layers keep latents of so many columns instead of K and V (see `LatentLayer`).

    Raises:
        ValueError: the method's parameters do not fit `num_layers` layers, or it does not work on
            latents.
    """

    layer_class: ClassVar[type[LayerCache]] = LayerCache
    latent_class: ClassVar[type[LatentLayer]] = LatentLayer

    def __init__(
        self,
        method: Policy,
        num_layers: int,
        meter: Meter | None = None,
        inv_freq: Tensor | None = None,
        rank: int | None = None,
        eight_bits: EightBits | None = None,
    ) -> None:
        method.check(num_layers)
        self.method = method.attention
        self.inv_freq = inv_freq
        self.eight_bits = eight_bits
        self.meter = Meter(num_layers) if meter is None else meter
        layer = self.layer_class if rank is None else partial(self.latent_class, rank=rank)
        self.layers = [layer(self, position) for position in range(num_layers)]
        self.beside: list[KVCache] = []
        self.counted = True
        self.reset()

    def __deepcopy__(self, memo: dict) -> KVCache:
        copy = memo[id(self)] = object.__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        for layer in copy.layers:
            layer.own(copy)
        return copy

    def reset(self) -> None:
        """Forget the sequences. The next `append` starts new ones."""
        for layer in self.layers:
            layer.reset()
        self.state = Notes()
        self.state.prompts = None
        self.steps = 0
        self.folded = 0
        self._logits: Tensor | None = None
        self.method.start(self)

    def logits_for(self, layer: Layer, q: Tensor) -> Tensor:
        """The buffer for the logits of a decode step, shared by all layers: [B, Hq, capacity] fp32,
        or fp16 for 16-bit K and V on a GPU."""
        return self._room_for_logits(q, (*q.shape[:2], layer.capacity))

    def staged_logits_for(self, layer: LayerCache, q: Tensor) -> Tensor:
        """The same buffer for drafts, q [B, Hq, m, D]: [B, m, Hq, capacity]."""
        batch, heads, drafts, _ = q.shape
        return self._room_for_logits(q, (batch, drafts, heads, layer.capacity))

    def _room_for_logits(self, q: Tensor, shape: tuple[int, ...]) -> Tensor:
        have = self._logits
        if have is None or have.shape != shape or have.device != q.device:
            have = self._logits = q.new_empty(shape, dtype=logits_dtype(q))
            self.meter.logits_bytes = have.nbytes
        return have

    def ring(self, size: int) -> Ring:
        """A ring for the notes of up to `size` steps, in memory that the method keeps."""
        return HostRing(size)

    def require_rotation(self) -> Tensor:
        """`inv_freq`, for methods that need it.

        Raises:
            ValueError: `inv_freq` is not known.
        """
        if self.inv_freq is None:
            raise ValueError(
                f"kvcomp: {type(self.method).__name__} moves keys to other positions, and this"
                " model is not known to rotate them in the usual way (RoPE over halves of the head,"
                " frequencies that do not change)"
            )
        return self.inv_freq

    def prefill(self, layer: LayerCache, q: Tensor, scale: float) -> None:
        """The prompt's K and V are in `layer`; q [B, Hq, n, D] are its queries."""
        layer.scale = scale
        self.method.prefill(layer, q)
        if layer.position == len(self.layers) - 1:
            self.meter.observe(self)

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """One decode step of one layer: q [B, Hq, D] -> out [B, Hq, D]."""
        out = self.method.attend(layer, q, scale)
        if layer.position == len(self.layers) - 1:
            self._end_step()
        return out

    def _end_step(self, rows: int | None = None) -> None:
        """Called when a decode step of `rows` rows is over; None: of all rows."""
        self.steps += 1
        self.meter.stepped(self, rows)
        self.method.end_step(self)
        self.method.between_steps(self)

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """Attention of the drafts staged in `layer`: q [B, Hq, m, D] -> out [B, m, Hq, D]."""
        return self.method.verify(layer, q, scale)

    @property
    def staged(self) -> int:
        """The number of drafts of each row that wait for `commit` or `discard`."""
        return self.layers[0].staged

    @property
    def room(self) -> float:
        """The number of tokens, including the last sampled one, that one `commit` may accept."""
        return self.method.room(self)

    def commit(self, counts: int | Tensor) -> None:
        """Keep the first drafts of each row as if they had been decode steps, and drop the others.

        Args:
            counts: drafts to keep, a number or [B] integers, at most `staged`.

        Raises:
            ValueError: more drafts than are staged or than `room` allows, or different counts for a
                method whose rows must stay in step (`Method.in_step`). Nothing has changed.
        """
        if not self.staged:
            raise ValueError("kvcomp: commit: nothing is staged")
        given = counts.tolist() if isinstance(counts, Tensor) else [counts]
        most, least = max(given), min(given)
        if not 0 <= least <= most <= self.staged or most > max(self.room, 1):
            raise ValueError(
                f"kvcomp: commit: expected 0 to {self.staged} of the staged tokens, and room for"
                f" them ({self.room}), got {given}"
            )
        if most > least and self.method.in_step:
            raise ValueError(
                f"kvcomp: commit: {type(self.method).__name__} counts steps for all rows together;"
                f" expected one number for all, got {given}"
            )
        self.meter.drafted(self, given)
        chosen = None
        if isinstance(counts, Tensor) and most > least:
            chosen = counts.to(self.layers[0].seq_lens.device)
        if most and not self.method.notes_steps:
            self._accept_many(given, chosen)
        else:
            self._accept_each(given, chosen)
        self.discard()
        if most > least:
            for layer in self.layers:
                layer.level()

    def _accept_each(self, given: list[int], counts: Tensor | None) -> None:
        """Take the drafts step by step; counts [B], or None if all rows take as many."""
        for index in range(max(given)):
            valid = counts > index if counts is not None and index >= min(given) else None
            for layer in self.layers:
                layer.accept(index, valid)
                self.method.accept(layer, index)
            self._end_step(sum(count > index for count in given) if valid is not None else None)

    def _accept_many(self, given: list[int], counts: Tensor | None) -> None:
        """Take all drafts at once."""
        most, rows = max(given), len(self.layers[0].seq_lens)
        added: int | Tensor = most
        valid = None
        if counts is not None:
            added, step = counts.int(), torch.arange(most, device=counts.device)
            valid = step < counts[:, None]
        for layer in self.layers:
            device = layer.seq_lens.device  # layers may be spread
            layer.accept_many(
                most,
                added.to(device) if isinstance(added, torch.Tensor) else added,
                None if valid is None else valid.to(device),
            )
        self.steps += most
        self.meter.accepted(self, given * rows if len(given) == 1 else given)
        self.method.end_step(self)

    def discard(self) -> None:
        """Drop the staged tokens as if they had never been there."""
        for layer in self.layers:
            layer.unstage()
        self.method.end_verify(self)

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens exactly. Raises ValueError if the method cannot."""
        if not self.method.croppable:
            raise ValueError(
                f"kvcomp: {type(self.method).__name__} cannot take tokens back:"
                f" {self.method.one_way} (crop, as assisted decoding needs it)"
            )
        for layer in self.layers:
            layer.crop(count)

    def adopt(self, other: KVCache, columns: int, room: int) -> None:
        """Copy the first `columns` columns of `other` into this empty cache.

        Args:
            room: number of columns to allocate memory for.

        Raises:
            ValueError: the method of `other` does not keep every token, or keeps notes.
        """
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.adopt(source, columns, room)

    def select(self, rows: Tensor) -> None:
        """Reorder, repeat or drop the sequences of every layer."""
        for layer in self.layers:
            layer.select(rows)
