"""The queries and keys of a window in every layer, from one forward pass of dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvcomp-capture"
_captured: list[list[tuple[Tensor, Tensor, float]]] = []


class Attention:
    """What a model attends to in a window.

    Attributes:
        layers: (q [Hq, T, D], k [Hkv, T, D], scale) of each, rotated as they are attended.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        before = model.config._attn_implementation
        self.layers: list[tuple[Tensor, Tensor, float]] = []
        _captured.append(self.layers)
        model.set_attn_implementation(NAME)
        try:
            with torch.no_grad():
                model.get_decoder()(ids[None], use_cache=False)
        finally:
            model.set_attn_implementation(before)
            _captured.remove(self.layers)

    def probabilities(self, layer: int, steps: Tensor) -> Tensor:
        """[Hq, steps, T]: of the queries at `steps`, 0 for what came later."""
        q, k, scale = self.layers[layer]
        keys = k.repeat_interleave(len(q) // len(k), 0)
        logits = torch.einsum("hsd,htd->hst", q[:, steps], keys) * scale
        place = torch.arange(k.shape[1], device=k.device)
        return logits.masked_fill(place > steps[:, None], -torch.inf).softmax(-1)

    def blocks(self, layer: int, size: int = 128) -> Iterator[tuple[int, Tensor]]:
        """All probabilities, some steps at a time: (first step, [Hq, steps, T])."""
        total = self.layers[layer][0].shape[1]
        for first in range(0, total, size):
            yield first, self.probabilities(layer, torch.arange(first, min(first + size, total)))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, causal."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _captured[-1].append((query[0].float(), key[0].float(), scale))
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2), None
