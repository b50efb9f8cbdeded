"""StaticMeter: a meter that counts on the device, for steps that run without the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from kvcomp._torch import keep_address
from kvcomp.cache.meter import Meter

if TYPE_CHECKING:
    from kvcomp.cache.kv_cache import KVCache
    from kvcomp.cache.layer import LayerCache
    from kvcomp.cache.static import StaticKVCache

Sizes = tuple[int, int, int]  # bytes by token of the longest row: K and V, notes; notes on rows


class StaticMeter(Meter):
    """A Meter whose steps count on the device. `settle` copies the counts to the host.

    Attributes:
        counts: [4 + layers] int64: steps, longest row summed over steps, rows decoded, tokens
            that dense attention reads in a layer, and tokens read by each layer.
        logit_bytes: bytes of the logits of one slot; 0 until a step has used logits.
        peaks: [3] int64: longest row, most bytes of K and V, and most bytes of notes; up to date
            before tokens leave and after `settle`.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.counts = torch.zeros(4 + num_layers, dtype=torch.int64)
        self.peaks = torch.zeros(3, dtype=torch.int64)
        self.logit_bytes = self._slots = 0
        self._reads: dict[int, Tensor] = {}  # [B] each, by layer, of the running step
        self._held: tuple[Tensor, Sizes] | None = None  # seq_lens [B] of the latest cache

    def count_on(self, device: torch.device) -> None:
        """Count on `device`. The address of the counts changes only with the device."""
        if self.counts.device != device:
            self.counts = self.counts.to(device)
        keep_address(self.counts)

    def attended(self, position: int, lens: Tensor) -> None:
        self._reads[position] = lens

    def stepped(self, cache: KVCache, rows: int | None = None) -> None:
        """Counts a step with one small reduction; all layers keep the same number of tokens."""
        kept, seen = cache.layers[0].seq_lens, cache.layers[0].logical_lens
        one = torch.ones_like(seen)
        reads = [self._reads[position] for position in range(len(cache.layers))]
        sums = torch.stack([one, seen, *reads]).sum(1)  # int64
        self.counts.add_(torch.cat([one[:1].long(), kept.max()[None].long(), sums]))
        self._reads.clear()

    def evicting(self, layer: LayerCache, kept_lens: Tensor) -> None:
        cache = _static(layer.cache)
        if layer.position == 0:  # there are never more than now
            self._look(layer.seq_lens, cache.sizes)
        super().evicting(layer, kept_lens)
        if layer.position == len(cache.layers) - 1:  # which may have noted positions for this
            self._hold(cache)

    def observe(self, cache: KVCache) -> None:
        """Settle the counts of an earlier cache and update the peaks from `cache`."""
        self.settle()
        self.token_bytes = [layer.token_bytes for layer in cache.layers]
        self.slot_bytes = [layer.slot_bytes for layer in cache.layers]
        self._lens = [(x.seq_lens, x.logical_lens, 0) for x in cache.layers]
        self._slots = len(cache.layers[0].seq_lens) * cache.layers[0].capacity
        self.allocated_bytes = self._slots * sum(self.slot_bytes)
        self._hold(cache)
        self.settle()

    def settle(self) -> None:
        """Bring the counts up to date. This waits for the device."""
        steps, longest, rows, dense, *reads = self.counts.tolist()
        self.counts.zero_()
        self.logits_bytes = self._slots * self.logit_bytes
        self.steps += steps
        self.sum_len += longest * len(reads)
        self.tokens_decoded += rows
        self.queries += rows
        self.dense_tokens += dense
        self.read_tokens = [a + b for a, b in zip(self.read_tokens, reads, strict=True)]
        self.attended_tokens = list(self.read_tokens)  # no drafts here
        if self._held is not None:
            self._look(*self._held)
        self.peak_len, self.peak_bytes, self.peak_note_bytes = self.peaks.tolist()

    def _hold(self, held: KVCache) -> None:
        cache = _static(held)
        rows = len(cache.layers[0].seq_lens)
        cache.sizes = (
            rows * sum(layer.slot_bytes for layer in cache.layers),
            rows * sum(layer.note_bytes for layer in cache.layers),
            sum(note.nbytes for layer in cache.layers for note in layer.state.values()),
        )
        self._held = cache.layers[0].seq_lens, cache.sizes

    def _look(self, lens: Tensor, sizes: Sizes) -> None:
        """Update the peaks with the current longest row, without waiting for the device."""
        longest = lens.max().long()
        slots, notes, rows = sizes
        now = torch.stack([longest, longest * slots, longest * notes + rows])
        self.peaks = torch.maximum(self.peaks.to(now.device), now)


def _static(cache: KVCache) -> StaticKVCache:
    """`cache` as the static cache that it is; this meter counts for no other."""
    return cast("StaticKVCache", cache)
