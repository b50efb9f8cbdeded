"""StaticCache: kvcomp's preallocated cache behind transformers' cache interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PretrainedConfig

from kvcomp.cache import StaticKVCache, StaticMeter
from kvcomp.cache.rows import EightBits
from kvcomp.cache.static import StaticLayerCache
from kvcomp.hf.cache import Cache
from kvcomp.hf.layer import Layer
from kvcomp.hf.outlast import outlasting
from kvcomp.methods import Method


class StaticLayer(Layer):
    """One managed layer. `get_seq_length` returns a tensor, so that positions can be traced."""

    is_compileable = True
    can_crop = False
    kv: StaticLayerCache

    def get_seq_length(self) -> Any:  # int or [] int64; transformers says int
        """A copy of the counter, so that the value does not change later."""
        return self.kv.cache.columns.clone() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # of a first prompt; later masks are not used

    def get_max_length(self) -> int:
        return self.kv.cache.max_tokens

    get_max_cache_shape = get_max_length

    def crop(self, tokens: int) -> None:
        self.kv.cache.crop(tokens)


class StaticCache(Cache):
    """A `Cache` with room for `max_tokens` columns, padding included."""

    layer_class = StaticLayer
    kv: StaticKVCache

    def __init__(
        self,
        config: PretrainedConfig,
        method: Method,
        meter: StaticMeter,
        max_tokens: int,
        eight_bits: EightBits | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        super().__init__(config, method, meter, eight_bits=eight_bits)

    @property
    def columns(self) -> int:
        return self.kv.seen

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context around each replay of a graph that you captured, for methods that evict. The
        host counts the step and then evicts if that is due."""
        outlasting(self.kv.enter)(1)
        yield
        outlasting(self.kv.leave)()

    def _new_kv(
        self, method: Method, num_layers: int, meter: StaticMeter, *rest: Any
    ) -> StaticKVCache:
        _, rank, eight_bits = rest
        return StaticKVCache(method, num_layers, meter, self.max_tokens, rank, eight_bits)
