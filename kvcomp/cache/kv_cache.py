"""KVCache: the layers of one batch of sequences, and the method that decides about them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, Protocol

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.cache.meter import Meter


class Policy(Protocol):
    """What a cache asks of its method. It is written out here because methods import caches and
    not the other way round; `kvcomp.methods.Method` says what each hook is for."""

    croppable: ClassVar[bool]

    def check(self, num_layers: int) -> None: ...
    def start(self, cache: KVCache) -> None: ...
    def prefill(self, layer: LayerCache, q: Tensor) -> None: ...
    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor: ...
    def end_step(self, cache: KVCache) -> None: ...


class KVCache:
    """The managed layers of one batch, their method, and what it remembers between layers.

    Attributes:
        method: decides what each layer attends to and keeps.
        layers: one LayerCache per managed layer, in model order.
        state: the method's own notes on this batch; emptied by `reset`.
        steps: decode steps since the last `reset`.
        meter: counts for this cache, and for others where it is shared.

    Raises:
        ValueError: the method's parameters do not fit `num_layers` layers.
    """

    def __init__(self, method: Policy, num_layers: int, meter: Meter | None = None) -> None:
        method.check(num_layers)
        self.method = method
        self.meter = Meter(num_layers) if meter is None else meter
        self.layers = [LayerCache(self, position) for position in range(num_layers)]
        self.reset()

    def reset(self) -> None:
        """Forget the sequences; the next `append` starts new ones."""
        for layer in self.layers:
            layer.reset()
        self.state = SimpleNamespace()
        self.steps = 0
        self.method.start(self)

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        """The prompt's K and V are in `layer`; q [B, Hq, n, D] are its queries."""
        if layer.position == len(self.layers) - 1:
            self.meter.observe(self)
        self.method.prefill(layer, q)

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """One decode step of one layer: q [B, Hq, D] -> out [B, Hq, D]."""
        out = self.method.attend(layer, q, scale)
        if layer.position == len(self.layers) - 1:
            self.steps += 1
            self.meter.stepped(self)
            self.method.end_step(self)
        return out

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens exactly; ValueError where the method cannot."""
        if not self.method.croppable:
            raise ValueError(
                f"kvcomp: {type(self.method).__name__} cannot take tokens back: what it dropped"
                " meanwhile is gone (crop, as assisted decoding needs it)"
            )
        for layer in self.layers:
            layer.crop(count)

    def select(self, rows: Tensor) -> None:
        """Reorder, repeat or drop the sequences of every layer."""
        for layer in self.layers:
            layer.select(rows)
