"""Meter: counts the reads of decode steps and the contents of caches without waiting for a GPU."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcomp.cache.kv_cache import KVCache
    from kvcomp.cache.layer import LayerCache


Count = int | Tensor  # a tensor if the layer is on a GPU, which is not waited for


class Meter:
    """Counts over all caches that share the meter. They outlive the caches.

    Attributes:
        tokens_decoded: rows times decode steps, including accepted drafts.
        queries: queries that attended, all rows; includes rejected drafts.
        dense_tokens: int64 scalar, tokens that a layer reads if it keeps and reads all.
        read_tokens: per managed layer, tokens read by attention; a shared read of drafts counts
            once.
        attended_tokens: per managed layer, tokens that the queries attended to.
        verifications: forwards over drafts.
        drafted_tokens, accepted_tokens: drafts in these forwards, and drafts that were accepted,
            all rows, without the token that was sampled before.
        peak_bytes: most bytes of K and V slots in use by one cache (rows times the longest row).
        peak_note_bytes: most bytes of the methods' notes on slots in use and on rows.
        allocated_bytes: bytes of the slabs of the latest cache, including spare capacity.
        logits_bytes: bytes of the latest buffer of logits, including spare capacity.
        peak_len, sum_len: longest row of any layer, and the sum over layers and steps.
        evictions: int64 scalar, how often tokens were evicted from a layer.
        evicted_tokens: per managed layer, evicted tokens, all rows.
        retrievals: per managed layer, selections made, all rows.
        wanted_rows, fetched_rows: per managed layer, selected rows of KV heads, and selected rows
            that had to come from the host.
        stored_rows: per managed layer, rows of KV heads copied to the host.
        row_bytes: per managed layer, bytes of K and V of one token and KV head.
        segments: [tokens + 1] int64, number of closed segments by length.
        recalls: [2] fp64, the covered share of the attention of the best set, in the step before a
            retrieval and in that step, summed over the `audits` audited retrievals.
        peak_host_bytes: most bytes of host memory for K and V of one cache.
        reencoded_tokens: tokens encoded again when a cache continued with a new context, all rows.
        boundary_seconds: how long decoding paused at each of these boundaries; 8 bytes each.
    """

    def __init__(self, num_layers: int) -> None:
        self.tokens_decoded = 0
        self.dense_tokens = torch.zeros((), dtype=torch.int64)
        self.read_tokens: list[Count] = [0] * num_layers
        self.attended_tokens: list[Count] = [0] * num_layers
        self.queries = 0
        self.verifications = self.drafted_tokens = self.accepted_tokens = 0
        self.token_bytes = [0] * num_layers
        self.slot_bytes = [0] * num_layers
        self.peak_bytes = self.peak_note_bytes = 0
        self.peak_len = self.sum_len = self.steps = 0
        self.evictions = torch.zeros((), dtype=torch.int64)
        self.evicted_tokens: list[Count] = [0] * num_layers
        self.retrievals: list[Count] = [0] * num_layers
        self.wanted_rows: list[Count] = [0] * num_layers
        self.fetched_rows: list[Count] = [0] * num_layers
        self.stored_rows: list[Count] = [0] * num_layers
        self.row_bytes = [0] * num_layers
        self.segments = torch.zeros(1, dtype=torch.int64)
        self.recalls, self.audits = torch.zeros(2, dtype=torch.float64), 0
        self.peak_host_bytes = 0
        self.reencoded_tokens = 0
        self.boundary_seconds = array("d")
        self.allocated_bytes = self.logits_bytes = 0
        # Of the latest cache, by layer: kept, seen in this context, and before it
        self._lens: list[tuple[Tensor, Tensor, int]] = []

    def __deepcopy__(self, memo: dict) -> Meter:
        return self  # a copied cache belongs to the same run

    def attended(self, position: int, lens: Tensor) -> None:
        """Attention of layer `position` reads lens [B] tokens."""
        total = _total(lens)
        _add(self.read_tokens, position, total)
        _add(self.attended_tokens, position, total)
        self.queries += lens.numel() if position == 0 else 0

    def verified(self, position: int, lens: Tensor, drafts: int | Tensor) -> None:
        """Attention of layer `position` reads lens [B] tokens once for its drafts, a number or [B]
        of them, which are the last of these tokens; each attends to itself and to all tokens before
        it."""
        total, rows = _total(lens), lens.numel()
        if isinstance(drafts, int):
            attended, queries = total * drafts - rows * drafts * (drafts - 1) // 2, rows * drafts
        else:
            attended = _total(lens * drafts - drafts * (drafts - 1) // 2)
            queries = int(drafts.sum()) if position == 0 else 0
        _add(self.read_tokens, position, total)
        _add(self.attended_tokens, position, attended)
        self.queries += queries if position == 0 else 0

    def drafted(self, cache: KVCache, counts: list[int]) -> None:
        """Of the staged tokens of `cache`, `counts` stay in each row; one count is for all rows."""
        rows = len(cache.layers[0].seq_lens)
        counts = counts * rows if len(counts) == 1 else counts
        self.verifications += 1
        staged = cache.layers[0].counts
        given = [cache.staged] * rows if staged is None else staged.tolist()
        self.drafted_tokens += sum(max(count - 1, 0) for count in given)
        self.accepted_tokens += sum(max(count - 1, 0) for count in counts)

    @contextmanager
    def trying(self, position: int) -> Iterator[None]:
        """Layer `position` tries cuts and selections; their reads and copies still count."""
        kept = self.retrievals[position], self.segments.clone()
        try:
            yield
        finally:
            self.retrievals[position], self.segments = kept

    def stepped(self, cache: KVCache, rows: int | None = None) -> None:
        """`cache` has finished a decode step of this many rows (None: all), and no tokens have left
        it since."""
        seen = cache.layers[0].logical_lens + cache.folded
        self.tokens_decoded += seen.shape[0] if rows is None else rows
        self.dense_tokens = self.dense_tokens.to(seen.device) + seen.sum()
        self.steps += 1
        self.sum_len += sum(layer.max_len for layer in cache.layers)
        self.observe(cache)

    def accepted(self, cache: KVCache, counts: list[int]) -> None:
        """`cache` has taken accepted drafts at once, counts [B], as it would have step by step."""
        most, seen = max(counts), cache.layers[0].logical_lens + cache.folded
        # In step i of `most`, a row that takes c tokens is max(c - i, 0) tokens shorter than now.
        missing = sum(count * (count - 1) // 2 for count in counts)
        self.tokens_decoded += sum(counts)
        self.dense_tokens = self.dense_tokens.to(seen.device) + most * seen.sum() - missing
        self.steps += most
        longest = sum(layer.max_len for layer in cache.layers)
        self.sum_len += most * longest - len(cache.layers) * most * (most - 1) // 2
        self.observe(cache)

    def evicting(self, layer: LayerCache, kept_lens: Tensor) -> None:
        """Rows of `layer` are about to be cut to kept_lens [B]."""
        gone = (layer.seq_lens - kept_lens).clamp(min=0).sum()
        self.evictions = self.evictions.to(gone.device) + (gone > 0)
        _add(self.evicted_tokens, layer.position, gone)

    def retrieved(self, layer: LayerCache, active: Tensor, wanted: Tensor, fetched: Tensor) -> None:
        """Rows of `layer` where active [B] is 1 selected wanted [B] tokens for each KV head, of
        which fetched [B, Hkv] came from the host."""
        _add(self.retrievals, layer.position, _total(active))
        _add(self.wanted_rows, layer.position, _total(active * wanted) * fetched.shape[1])
        _add(self.fetched_rows, layer.position, _total(fetched))

    def stored(self, layer: LayerCache, tokens: Tensor) -> None:
        """tokens [B] of every KV head of `layer` go to the host."""
        heads = layer.kv_heads
        self.row_bytes[layer.position] = layer.hosted.pool.row_bytes
        _add(self.stored_rows, layer.position, _total(tokens) * heads)

    def cut(self, closed: Tensor, longest: int) -> None:
        """Segments of closed [B] tokens end, at most `longest`; 0: none does."""
        missing = longest + 1 - len(self.segments)
        if missing > 0:
            self.segments = torch.nn.functional.pad(self.segments, (0, missing))
        self.segments = self.segments.to(closed.device)
        self.segments.scatter_add_(0, closed.long(), torch.ones_like(closed, dtype=torch.int64))

    def audited(self, before: Tensor, after: Tensor) -> None:
        """Mass [n] in rows that selected: covered by the old set a step ago, by the new set now."""
        self.recalls += torch.stack([before.double().sum(), after.double().sum()]).cpu()
        self.audits += len(after)

    def observe(self, cache: KVCache) -> None:
        """Update the peaks from `cache`. Called when it has grown, and before tokens leave it."""
        if not cache.counted:
            return
        used = allocated = notes = host = longest = 0
        rows = cache.layers[0].seq_lens.shape[0]
        for position, layer in enumerate(cache.layers):  # at every step: only what there is
            length, size = layer.max_len, layer.slot_bytes
            self.token_bytes[position] = layer.token_bytes
            self.slot_bytes[position] = size
            longest = max(longest, length)
            used += length * size
            allocated += layer.capacity * size
            if layer.slots:
                notes += length * layer.note_bytes * rows
            if layer.state or layer.is_hosted:
                notes += layer.row_note_bytes
                host += layer.host_bytes
            for each in cache.beside:
                used += each.layers[position].max_len * size
                allocated += each.layers[position].capacity * size
        self.peak_len = max(self.peak_len, longest)
        self.peak_bytes = max(self.peak_bytes, used * rows)
        self.peak_note_bytes = max(self.peak_note_bytes, notes)
        self.peak_host_bytes = max(self.peak_host_bytes, host)
        self.allocated_bytes = allocated * rows
        self._lens = [(x.seq_lens, x.logical_lens, cache.folded) for x in cache.layers]

    @property
    def kept_tokens(self) -> list[int]:
        """Tokens that the latest cache keeps in each layer, all rows. Reads the device."""
        return [int(kept.sum()) for kept, *_ in self._lens]

    @property
    def seen_tokens(self) -> list[int]:
        """Tokens that the latest cache has seen in each layer, all rows. Reads the device."""
        return [int((seen + before).sum()) for _, seen, before in self._lens]


def _total(counts: Tensor) -> Count:
    """The sum; a number on the CPU, because adding up tensors would take ten times as long."""
    if counts.is_cuda:
        return counts.sum()
    return sum((counts if counts.ndim == 1 else counts.flatten()).tolist())


def _add(counts: list[Count], position: int, count: Count) -> None:
    have = counts[position]
    if isinstance(have, Tensor) and isinstance(count, Tensor):
        have = have.to(count.device)
    counts[position] = have + count
