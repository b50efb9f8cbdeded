"""Hosted: all tokens of one layer in host memory, for methods that retrieve.

The layer's slots then hold only the first tokens (sinks), the newest ones and the ones fetched
last. A pool holds all tokens, and an index holds the units in which a method retrieves them. A
prompt is cut into units in the background, during the rest of the prefill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.host_pool import HostMemory, HostPool
from kvcomp.cache.unit_index import UnitIndex

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvcomp.cache.background import Background
    from kvcomp.cache.layer import LayerCache


class Cutter(Protocol):
    """How a method cuts a prompt into units; `kvcomp.methods.retrieval.Retrieval` explains each."""

    @property
    def unit_size(self) -> int: ...
    @property
    def num_newest(self) -> int: ...
    def unit_count(self, tokens: int) -> int: ...
    def units(self, keys: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def digest(self, keys: Tensor) -> Tensor: ...


class Hosted:
    """The tokens of one layer in host memory. The layer owns this object and is passed to it.

    Attributes:
        pool: K and V of every token except those of the open segment.
        index: the units in which tokens are retrieved.
        sinks: number of first tokens, which never leave the layer's slots.
        pending: waits for the background work on pool and index; None: there is none.
    """

    def __init__(
        self, layer: LayerCache, memory: HostMemory, background: Background, width: int, sinks: int
    ) -> None:
        """An empty pool for the tokens of `layer`, and no units; digests are `width` wide."""
        self.pool = HostPool(layer.stored(), memory)
        like, _ = layer.decoded(layer.stored(1))
        self.index = UnitIndex(like.shape[0], like.shape[1], width, like)
        self.index.starts.fill_(sinks)
        self.sinks = sinks
        self.pending: Callable[[], None] | None = None
        self._background = background

    def __getstate__(self) -> dict:
        """For copies: background work belongs to this object and not to its copy."""
        self.settle()
        return self.__dict__

    def settle(self) -> None:
        """Wait for the background work, and raise what it raised, at every call."""
        if self.pending is not None:
            self.pending()
            self.pending = None

    def reserve(self, layer: LayerCache) -> None:
        """Room in the pool for all columns of `layer`, and for the sinks that may still come."""
        self.pool.reserve(max(layer.columns, self.sinks))

    def absorb(
        self, layer: LayerCache, cutter: Cutter, first_row: Tensor, first: Tensor, last: Tensor
    ) -> None:
        """The tokens in slots [first, seq_lens) become units, in the background.

        `cutter` cuts those in [first, last), which go to the pool from row `first_row` on. The
        others stay local and become units in their order. All three are [B] int32.
        """
        rows, keys, pool, index = layer.stored(), layer.keys, self.pool, self.index
        self.reserve(layer)
        clusters = cutter.unit_count(keys.shape[2])
        pieces = -(-cutter.num_newest // cutter.unit_size)
        index.reserve(clusters + pieces)
        before = index.num_units.clone()
        index.num_units += clusters + pieces
        index.num_indexed.copy_(before + clusters)
        layer.cache.meter.stored(layer, (layer.logical_lens - first_row).clamp(min=0))
        first, last, end = first.clone(), last.clone(), layer.seq_lens.clone()

        def work() -> None:
            # Read before the clustering starts, so that the host does not wait for the clustering.
            table = torch.stack([before, first_row, first, last, end], 1).tolist()
            labels, digests, sizes = cutter.units(keys, first, last)
            for row, (unit, pool_row, begin, middle, stop) in enumerate(table):
                sinks = slice(min(self.sinks, stop))
                mine = rows.row(row)
                pool.write(row, 0, mine.part(sinks))
                order = labels[row, :, begin:middle].argsort(dim=-1, stable=True)
                pool.write(row, pool_row, mine.part(slice(begin, middle)).take(order, 1))
                index.write(row, unit, digests[row], sizes[row])
                pool.write(row, pool_row + middle - begin, mine.part(slice(middle, stop)))
                k = keys[row, :, middle:stop]
                for piece in range(pieces):
                    tokens = k[:, piece * cutter.unit_size : (piece + 1) * cutter.unit_size]
                    size = sizes.new_full((len(k), 1), tokens.shape[1])
                    if not tokens.shape[1]:  # an empty unit's digest is not kept, but must exist
                        tokens = keys[row, :, :1]
                    index.write(row, unit + clusters + piece, cutter.digest(tokens)[:, None], size)

        tensors = *rows.parts, keys, first, last, index.starts, index.digests
        self.pending = self._background.submit(work, *tensors)

    def store(self, layer: LayerCache, closed: Tensor, means: Tensor) -> None:
        """Write the newest unit, of closed [B] tokens (0: none), to the pool.

        Args:
            means: [B, Hkv, U, D], gets the mean key of each such unit.
        """
        rows = layer.stored(layer.capacity)
        ops.store_segments(
            *rows[:2],
            layer.positions(layer.kv_heads),
            layer.seq_lens,
            self.index.starts,
            self.index.num_units,
            closed,
            self.pool.blocks,
            means,
            words=rows.words,
            turned=layer.eight_bits is not None and layer.eight_bits.turn,
        )
        layer.cache.meter.stored(layer, closed)

    def exchange(
        self, layer: LayerCache, rows: Tensor, first_local: Tensor, active: Tensor, most: int
    ) -> Tensor:
        """Bring the wanted pool rows into the layer's slots, see `ops.fetch_rows`.

        Args:
            rows: [B, Hkv, K] int32, as `ops.select_units` returns them.
            first_local, active: [B] int32.
            most: tokens a row has at most afterwards, known on the host.

        Returns:
            fetched [B, Hkv] int32: rows that came over the link.
        """
        layer.positions(layer.kv_heads)  # brings them up to date
        with layer.rewriting(min(most, layer.columns)) as slots:
            return ops.fetch_rows(
                *slots[:2],
                layer.slots["position"],
                layer.seq_lens,
                rows,
                first_local,
                active,
                self.pool.blocks,
                num_sinks=self.sinks,
                words=slots.words,
            )

    def recede(self, layer: LayerCache, columns: int, units: Tensor) -> None:
        """Back to the first `columns` columns, which are units [0, units), units [B] int32.

        The pool has all of them; the layer's slots keep the sinks.
        """
        self.settle()
        layer.truncate(columns, self.sinks)
        for count in (self.index.num_units, self.index.num_indexed):
            count.copy_(units)  # all of them can be selected

    def select(self, rows: Tensor) -> None:
        """Sequences become `rows` ([B'] int64).

        Raises:
            HostMemoryError: the memory was refused; what is there stays.
        """
        self.settle()
        self.pool.select(rows)
        self.index.select(rows)
