"""Meter: counts what decode steps read and what caches hold, without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcomp.cache.kv_cache import KVCache
    from kvcomp.cache.layer import LayerCache


class Meter:
    """Figures over all caches that share it; they outlive the caches.

    Attributes:
        tokens_decoded: rows times decode steps.
        dense_tokens: int64 scalar, tokens a layer that keeps and reads all would have read.
        read_tokens: per managed layer an int64 scalar, tokens read by attention.
        peak_bytes: most bytes of K and V slots in use by one cache (rows times the longest row).
        peak_note_bytes: most bytes that methods remember about the slots in use and the rows.
        allocated_bytes: the slabs of the latest cache, spare capacity included.
        peak_len, sum_len: longest row of any layer, and the sum over layers and steps.
        evictions: int64 scalar, times that tokens were taken out of a layer.
        evicted_tokens: per managed layer an int64 scalar, tokens taken out, all rows.
    """

    def __init__(self, num_layers: int) -> None:
        self.tokens_decoded = 0
        self.dense_tokens = torch.zeros((), dtype=torch.int64)
        self.read_tokens = [torch.zeros((), dtype=torch.int64) for _ in range(num_layers)]
        self.token_bytes = [0] * num_layers
        self.slot_bytes = [0] * num_layers
        self.peak_bytes = self.peak_note_bytes = 0
        self.peak_len = self.sum_len = self.steps = 0
        self.evictions = torch.zeros((), dtype=torch.int64)
        self.evicted_tokens = [torch.zeros((), dtype=torch.int64) for _ in range(num_layers)]
        self.allocated_bytes = 0
        self._lens: list[tuple[Tensor, Tensor]] = []  # of the latest cache: kept and seen

    def __deepcopy__(self, memo: dict) -> Meter:
        return self  # a copied cache belongs to the same run

    def attended(self, position: int, lens: Tensor) -> None:
        """Attention of layer `position` reads lens [B] tokens."""
        self.read_tokens[position] = self.read_tokens[position].to(lens.device) + lens.sum()

    def stepped(self, cache: KVCache) -> None:
        """`cache` has finished a decode step, and nothing has left it since."""
        seen = cache.layers[0].logical_lens
        self.tokens_decoded += seen.shape[0]
        self.dense_tokens = self.dense_tokens.to(seen.device) + seen.sum()
        self.steps += 1
        self.sum_len += sum(layer.max_len for layer in cache.layers)
        self.observe(cache)

    def evicting(self, layer: LayerCache, kept_lens: Tensor) -> None:
        """Rows of `layer` are about to be cut to kept_lens [B]."""
        gone = (layer.seq_lens - kept_lens).clamp(min=0).sum()
        self.evictions = self.evictions.to(gone.device) + (gone > 0)
        count = self.evicted_tokens[layer.position]
        self.evicted_tokens[layer.position] = count.to(gone.device) + gone

    def observe(self, cache: KVCache) -> None:
        """Look at what `cache` holds: before anything leaves it, and when it has grown."""
        used = allocated = notes = 0
        for position, layer in enumerate(cache.layers):
            self.token_bytes[position] = layer.token_bytes
            self.slot_bytes[position] = layer.slot_bytes
            used += layer.max_len * layer.slot_bytes
            notes += layer.max_len * layer.note_bytes * len(layer.seq_lens)
            notes += sum(tensor.nbytes for tensor in layer.state.values())
            allocated += layer.capacity * layer.slot_bytes
            self.peak_len = max(self.peak_len, layer.max_len)
        rows = cache.layers[0].seq_lens.shape[0]
        self.peak_bytes = max(self.peak_bytes, used * rows)
        self.peak_note_bytes = max(self.peak_note_bytes, notes)
        self.allocated_bytes = allocated * rows
        self._lens = [(layer.seq_lens, layer.logical_lens) for layer in cache.layers]

    @property
    def kept_tokens(self) -> list[int]:
        """Per layer, tokens that the latest cache keeps, all rows; reads the device."""
        return [int(kept.sum()) for kept, _ in self._lens]

    @property
    def seen_tokens(self) -> list[int]:
        """Per layer, tokens that the latest cache has seen, all rows; reads the device."""
        return [int(seen.sum()) for _, seen in self._lens]
