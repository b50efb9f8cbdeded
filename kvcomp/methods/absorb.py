"""What a prompt becomes: units in host memory, made beside the rest of the prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache

if TYPE_CHECKING:
    from kvcomp.methods.retrieval import Retrieval


def absorb(
    method: Retrieval, layer: LayerCache, first_row: Tensor, first: Tensor, last: Tensor
) -> None:
    """Tokens in slots [first, seq_lens) become units, in the background.

    Those of [first, last) as `method.units` cuts them, from pool row `first_row` on; the rest,
    which stay local, in their order. All three are [B] int32.
    """
    keys, values, pool, index = layer.keys, layer.values, layer.pool, layer.index
    method.reserve_pool(layer)
    clusters = method.unit_count(keys.shape[2])
    pieces = -(-method.num_newest // method.unit_size)
    index.reserve(clusters + pieces)
    before = index.num_units.clone()
    index.num_units += clusters + pieces
    index.num_indexed.copy_(before + clusters)
    layer.cache.meter.stored(layer, (layer.logical_lens - first_row).clamp(min=0))
    first, last, end = first.clone(), last.clone(), layer.seq_lens.clone()

    def work() -> None:
        # Read before the clustering is under way, for which the host need not wait then.
        table = torch.stack([before, first_row, first, last, end], 1).tolist()
        labels, digests, sizes = method.units(keys, first, last)
        for row, (unit, pool_row, begin, middle, stop) in enumerate(table):
            sinks = slice(min(method.sinks, stop))
            pool.write(row, 0, keys[row, :, sinks], values[row, :, sinks])
            order = labels[row, :, begin:middle].argsort(dim=-1, stable=True)[..., None]
            k, v = (x[row, :, begin:middle].take_along_dim(order, 1) for x in (keys, values))
            pool.write(row, pool_row, k, v)
            index.write(row, unit, digests[row], sizes[row])
            k, v = (x[row, :, middle:stop] for x in (keys, values))
            pool.write(row, pool_row + middle - begin, k, v)
            for piece in range(pieces):
                tokens = k[:, piece * method.unit_size : (piece + 1) * method.unit_size]
                size = sizes.new_full((len(k), 1), tokens.shape[1])
                if not tokens.shape[1]:  # an empty unit's digest is not kept, but must exist
                    tokens = keys[row, :, :1]
                index.write(row, unit + clusters + piece, method.digest(tokens)[:, None], size)

    tensors = keys, values, first, last, index.starts, index.digests
    layer.pending = layer.cache.state.background.submit(work, *tensors)
