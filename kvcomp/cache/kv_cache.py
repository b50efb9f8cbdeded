"""KVCache: the layers of one batch of sequences, and the method that decides about them."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.cache.meter import Meter
from kvcomp.cache.ring import HostRing, Ring
from kvcomp.cache.view import Layer
from kvcomp.ops.decode_attention import logits_dtype


class Policy(Protocol):
    """What a cache asks of its method. It is written out here because methods import caches and
    not the other way round; `kvcomp.methods.Method` says what each hook is for."""

    croppable: ClassVar[bool]
    in_step: ClassVar[bool]
    one_way: ClassVar[str]

    @property
    def attention(self) -> Policy: ...
    @property
    def drafts_refused(self) -> str | None: ...
    def check(self, num_layers: int) -> None: ...
    def start(self, cache: KVCache) -> None: ...
    def prefill(self, layer: LayerCache, q: Tensor) -> None: ...
    def context(self, layer: LayerCache) -> tuple[Tensor, Tensor, Tensor]: ...
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
    """What a method remembers about a batch, by name. A class of our own, since dynamo does not
    trace assignments to a SimpleNamespace."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class KVCache:
    """The managed layers of one batch, their method, and what it remembers between layers.

    Attributes:
        method: decides what each layer attends to and keeps.
        layers: one LayerCache per managed layer, in model order.
        state: the method's own notes on this batch; emptied by `reset`.
        steps: decode steps since the last `reset`.
        meter: counts for this cache, and for others where it is shared.
        inv_freq: [R / 2] fp32, radians per position by which the model rotates its keys, for
            methods that move keys to other positions; None where that is not known.
        folded: tokens that each row had in earlier contexts and has no longer.
        beside: other caches that hold a context of the same sequences; counted with this one.
        counted: False for those others.

    Raises:
        ValueError: the method's parameters do not fit `num_layers` layers.
    """

    layer_class: ClassVar[type[LayerCache]] = LayerCache

    def __init__(
        self,
        method: Policy,
        num_layers: int,
        meter: Meter | None = None,
        inv_freq: Tensor | None = None,
    ) -> None:
        method.check(num_layers)
        self.method = method.attention
        self.inv_freq = inv_freq
        self.meter = Meter(num_layers) if meter is None else meter
        self.layers = [self.layer_class(self, position) for position in range(num_layers)]
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
        """Forget the sequences; the next `append` starts new ones."""
        for layer in self.layers:
            layer.reset()
        self.state = Notes()
        self.state.prompts = None
        self.steps = 0
        self.folded = 0
        self._logits: Tensor | None = None
        self.method.start(self)

    def logits_for(self, layer: Layer, q: Tensor) -> Tensor:
        """Room for the logits of a decode step, [B, Hq, capacity] fp32, or fp16 beside 16-bit K and
        V on a GPU; all layers share it."""
        return self._room_for_logits(q, (*q.shape[:2], layer.capacity))

    def staged_logits_for(self, layer: LayerCache, q: Tensor) -> Tensor:
        """The same for drafts, q [B, Hq, m, D]: [B, m, Hq, capacity]."""
        batch, heads, drafts, _ = q.shape
        return self._room_for_logits(q, (batch, drafts, heads, layer.capacity))

    def _room_for_logits(self, q: Tensor, shape: tuple[int, ...]) -> Tensor:
        have = self._logits
        if have is None or have.shape != shape or have.device != q.device:
            have = self._logits = q.new_empty(shape, dtype=logits_dtype(q))
            self.meter.logits_bytes = have.nbytes
        return have

    def ring(self, size: int) -> Ring:
        """For notes of up to `size` steps, in memory that a method keeps."""
        return HostRing(size)

    def require_rotation(self) -> Tensor:
        """`inv_freq`, for methods that cannot do without.

        Raises:
            ValueError: it is not known.
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
        """A decode step is over; `rows` of them took part in it, None: all."""
        self.steps += 1
        self.meter.stepped(self, rows)
        self.method.end_step(self)
        self.method.between_steps(self)

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """The drafts staged in `layer` attend: q [B, Hq, m, D] -> out [B, m, Hq, D]."""
        return self.method.verify(layer, q, scale)

    @property
    def staged(self) -> int:
        """Drafts of each row that wait for `commit` or `discard`."""
        return self.layers[0].staged

    @property
    def room(self) -> float:
        """Tokens, the one that was sampled last included, that one `commit` may accept."""
        return self.method.room(self)

    def commit(self, counts: int | Tensor) -> None:
        """The first drafts of each row were decode steps, and the others have never been.

        Args:
            counts: of each row, a number or [B] integers, at most `staged`.

        Raises:
            ValueError: more than are staged or than there is `room` for, or rows that differ under
                a method whose rows must stay in step (`Method.in_step`). Nothing has changed.
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
        for index in range(most):
            valid = None
            if isinstance(counts, Tensor) and index >= least:
                valid = counts.to(self.layers[0].seq_lens.device) > index
            for layer in self.layers:
                layer.accept(index, valid)
                self.method.accept(layer, index)
            self._end_step(sum(count > index for count in given) if valid is not None else None)
        self.discard()
        if most > least:
            for layer in self.layers:
                layer.level()

    def discard(self) -> None:
        """The staged tokens have never been."""
        for layer in self.layers:
            layer.unstage()
        self.method.end_verify(self)

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens exactly; ValueError where the method cannot."""
        if not self.method.croppable:
            raise ValueError(
                f"kvcomp: {type(self.method).__name__} cannot take tokens back:"
                f" {self.method.one_way} (crop, as assisted decoding needs it)"
            )
        for layer in self.layers:
            layer.crop(count)

    def adopt(self, other: KVCache, columns: int, room: int) -> None:
        """From empty, become a copy of the first `columns` columns of `other`.

        Args:
            room: columns that there will be in all; memory for them is taken at once.

        Raises:
            ValueError: the method of `other` keeps less, or more, than every token.
        """
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.adopt(source, columns, room)

    def select(self, rows: Tensor) -> None:
        """Reorder, repeat or drop the sequences of every layer."""
        for layer in self.layers:
            layer.select(rows)
