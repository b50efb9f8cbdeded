"""Recorders: methods that attend densely and note what a calibration measures."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache import KVCache, LayerCache
from kvcomp.methods import Delta, Method
from kvcomp.methods.eviction import ObservingEviction

COVERED = 0.8  # share of the tokens whose longest interval LazyEviction's window covers


@dataclass(frozen=True)
class PageRecorder(Method):
    """Dense attention that records at some steps how well the pages of a layer suit the others."""

    method: Delta
    every: int
    recalls: list[Tensor] = field(default_factory=list)  # [layers, layers] per sampled step

    def start(self, cache: KVCache) -> None:
        cache.state.scores = []

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        cache, state = layer.cache, layer.cache.state
        if cache.steps % self.every or layer.max_len <= self.method.budget:
            return layer.attend(q, scale)[0]
        logits = cache.logits_for(layer, q)
        out, lse = layer.attend(q, scale, logits=logits)
        state.scores.append(self.method.score(logits[:, :, : layer.max_len], lse, layer.seq_lens))
        if len(state.scores) == len(cache.layers):
            self.recalls.append(self._recall(torch.stack(state.scores), layer.seq_lens))
            state.scores = []
        return out

    def _recall(self, scores: Tensor, seq_lens: Tensor) -> Tensor:
        """scores [layers, B, 1, pages] -> [a, b]: share of b's best-K mass on the pages of a."""
        method = self.method
        masks = []
        for layer_scores in scores:
            page_ids, _ = ops.select_pages(
                layer_scores, seq_lens, method.page_size, method.num_pages, num_recent=method.recent
            )
            mask = torch.zeros(*layer_scores.shape[:-1], layer_scores.shape[-1] + 1)
            masks.append(mask.scatter(-1, page_ids.long().cpu() % mask.shape[-1], 1.0)[..., :-1])
        kept = torch.einsum("abip,cbip->acb", torch.stack(masks), scores.cpu())
        own = kept.diagonal(dim1=0, dim2=1).T[None]  # [1, layers, B]
        return (kept / own).mean(-1)


@dataclass(frozen=True)
class IntervalRecorder(ObservingEviction):
    """Dense attention that tracks the longest interval of every token, for several alphas."""

    budget: int = 2**30
    alphas: tuple[float, ...] = ()
    caches: list[list[LayerCache]] = field(default_factory=list)

    def start(self, cache: KVCache) -> None:
        super().start(cache)
        self.caches.append(cache.layers)

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        for alpha in self.alphas:
            layer.track(f"last_hit {alpha}", self.num_units(layer))
            layer.track(f"longest {alpha}", self.num_units(layer))
        layer.state["tracked"] = torch.zeros_like(layer.logical_lens)

    def observe(self, layer: LayerCache, logits: Tensor, lse: Tensor) -> None:
        born = layer.logical_lens - layer.state["tracked"]
        layer.state["tracked"] = layer.logical_lens.clone()
        words = -(-layer.capacity // 32)
        hits = layer.seq_lens.new_empty(len(lse), 1, self.num_units(layer), words)
        for alpha in self.alphas:
            ops.attention_hits(logits, lse, layer.seq_lens, hits[:, 0], alpha)
            last_hit, longest = layer.slots[f"last_hit {alpha}"], layer.slots[f"longest {alpha}"]
            step = layer.cache.steps + 1
            ops.recurrence_update(hits, last_hit, longest, layer.seq_lens, born, step)

    @property
    def longest_row(self) -> int:
        return max(layer.max_len for layers in self.caches for layer in layers)

    def windows(self) -> dict[float, int]:
        """For each alpha, the window that covers the longest intervals of most hit tokens."""
        found = {}
        for alpha in self.alphas:
            intervals = torch.cat(
                [
                    layer.slots[f"longest {alpha}"].flatten()
                    for layers in self.caches
                    for layer in layers
                    if layer.slots
                ]
            )
            intervals = intervals[intervals > 0].sort().values
            if len(intervals):
                found[alpha] = int(intervals[int(COVERED * (len(intervals) - 1))])
        if not found:
            raise ValueError("kvcomp.LazyEviction.calibrate: no token was hit by any alpha")
        return found


@dataclass(frozen=True)
class SimilarityRecorder(Method):
    """Dense attention that records the similarity of successive queries."""

    dense_layers: int
    seen: list[list[Tensor]] = field(default_factory=list)  # per cache, [B] of each step and layer

    def start(self, cache: KVCache) -> None:
        self.seen.append([])
        cache.state.queries = [None] * len(cache.layers)
        cache.state.seen = self.seen[-1]

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        state, place = layer.cache.state, layer.position
        if place >= self.dense_layers:
            if state.queries[place] is None:
                state.queries[place] = torch.zeros_like(q, memory_format=torch.contiguous_format)
            state.seen.append(ops.query_similarity(q, state.queries[place]).cpu())
        return layer.attend(q, scale)[0]
