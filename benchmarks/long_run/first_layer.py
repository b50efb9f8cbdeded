"""Are the keys in a cache those of the right tokens, at the right positions?

What the first layer makes of a token depends on that token and its position alone, and not on what
came before. So every row that a cache holds of it can be made again, by a copy of the model that
has no other layer and is not patched, however long ago it came in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvcomp.cache import KVCache, LayerCache
from kvcomp.methods import Method
from kvcomp.methods.eviction import Eviction
from kvcomp.methods.retrieval import Retrieval

AT_ONCE = 4096  # tokens, each a row of a batch
PRECISION = 2**-6  # of the largest element: keys in bf16, made with other shapes of products


@dataclass(frozen=True)
class Rows:
    """What one KV head holds: token ids and positions [n], k and v [n, D]."""

    head: int
    ids: Tensor
    positions: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Finding:
    """Of all rows of K and V: the largest error, as a share of the largest element, and the
    smallest that the keys would have had one position further."""

    rows: int
    error: float
    shifted: float

    @property
    def right(self) -> bool:
        return self.error <= PRECISION < self.shifted


class FirstLayer:
    """
    Args:
        model: copied; it is not patched yet.
        prompt: ids, [n].
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self.decoder = copy.deepcopy(model).get_decoder()
        self.decoder.layers = self.decoder.layers[:1]
        self.decoder.config.num_hidden_layers = 1
        self.prompt = prompt

    def make(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [n, Hkv, D] of tokens [n] at positions [n]."""
        made = []
        for some, places in zip(ids.split(AT_ONCE), positions.split(AT_ONCE), strict=True):
            cache = DynamicCache(config=self.decoder.config)
            self.decoder(
                input_ids=some[:, None], position_ids=places[:, None], past_key_values=cache
            )
            made.append((cache.layers[0].keys[:, :, 0], cache.layers[0].values[:, :, 0]))
        k, v = (torch.cat(part) for part in zip(*made, strict=True))
        return k, v

    def compare(self, kv: KVCache, context: Tensor, method: Method) -> Finding:
        """What `kv` holds of the first layer beside what there should be.

        Args:
            context: ids of all tokens that this context has seen, [n].
        """
        count, error, shifted = 0, 0.0, torch.inf
        for rows in self._held(kv, context, method):
            k, v = (part[:, rows.head] for part in self.make(rows.ids, rows.positions))
            further = self.make(rows.ids, rows.positions + 1)[0][:, rows.head]
            for have, want in ((rows.k, k), (rows.v, v)):
                error = max(error, _apart(have, want).max().item())
            shifted = min(shifted, _apart(rows.k, further).min().item())
            count += len(rows.ids)
        return Finding(count, error, shifted)

    def _held(self, kv: KVCache, context: Tensor, method: Method) -> Iterator[Rows]:
        layer, attention = kv.layers[0], method.attention
        heads, held = layer.keys.shape[1], int(layer.seq_lens)
        if isinstance(attention, Retrieval):
            yield from self._retrieved(layer, context)
            return
        positions = torch.arange(held).expand(heads, -1)
        if isinstance(attention, Eviction):
            positions = layer.positions(attention.num_units(layer))[0].long()
        for head, places in enumerate(positions.expand(heads, -1)):
            assert len(places.unique()) == held, "a token is held twice"
            k, v = layer.keys[0, head], layer.values[0, head]
            yield Rows(head, context[places], places, k, v)

    def _retrieved(self, layer: LayerCache, context: Tensor) -> Iterator[Rows]:
        """The rows of the pool, of closed segments, and those on the device."""
        layer.settle()
        closed, held = int(layer.hosted.index.first_open()), int(layer.seq_lens)
        pool_k, pool_v, _ = layer.hosted.pool.read(0, 0, closed)
        for head, table in enumerate(layer.positions(pool_k.shape[0])[0].long()):
            place = torch.arange(len(context))  # of each row of the pool; the output in its order
            place[: len(self.prompt)] = self._order(pool_k[head, : len(self.prompt)], head)
            for rows, k, v in (
                (torch.arange(closed), pool_k[head], pool_v[head]),
                (table, layer.keys[0, head], layer.values[0, head]),
            ):
                yield Rows(head, context[place[rows]], place[rows], k, v)
            assert len(table.unique()) == held, "a token is held twice"

    def _order(self, rows: Tensor, head: int) -> Tensor:
        """The pool has a prompt cluster by cluster: the position of each of its rows."""
        positions = torch.arange(len(self.prompt))
        k = self.make(self.prompt, positions)[0][:, head]
        nearest = torch.cdist(rows.float(), k.float()).argmin(1)
        assert torch.equal(nearest.sort().values, positions), "a token of the prompt is missing"
        return nearest


def resident_rows_are_the_pools(kv: KVCache) -> bool:
    """Whether what retrieving layers hold on the device is what the pool says, bit by bit."""
    for layer in kv.layers:
        if not layer.is_hosted:
            continue
        layer.settle()
        closed = int(layer.hosted.index.first_open())
        pool = layer.hosted.pool.read(0, 0, closed).parts
        for head, table in enumerate(layer.positions(layer.keys.shape[1])[0].long()):
            there = table < closed
            for have, rows in zip((layer.keys, layer.values), pool, strict=True):
                if not torch.equal(have[0, head, there], rows[head, table[there]]):
                    return False
    return True


def _apart(have: Tensor, want: Tensor) -> Tensor:
    """The largest difference in each row, as a share of the largest element of all: [n]."""
    return (have.float() - want.float()).abs().amax(-1) / want.float().abs().max()
