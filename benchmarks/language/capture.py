"""The queries and keys of a window in the layers that attend to everything, from one forward pass
of dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from language.door import attending, causal

KINDS = {"full_attention", "sliding_attention"}  # of layers in what can be captured


class Attention:
    """The queries and keys of a model in a window.

    Attributes:
        layers: (q [Hq, T, D], k [Hkv, T, D], scale) of each layer with full attention, rotated as
            they are attended.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.layers: list[tuple[Tensor, Tensor, float]] = []
        config = model.config.get_text_config()
        self.window = getattr(config, "sliding_window", None)
        self.kinds = getattr(config, "layer_types", None)
        with attending(model, self._attend), torch.no_grad():
            model.get_decoder()(ids[None], use_cache=False)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.kinds and self.kinds[layer] == "sliding_attention":
            return causal(q, k, v, scale, self.window)
        self.layers.append((q[0].float(), k[0].float(), scale))
        return causal(q, k, v, scale)

    def probabilities(self, layer: int, steps: Tensor) -> Tensor:
        """[Hq, steps, T]: probabilities of the queries at `steps`, 0 for later tokens."""
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
