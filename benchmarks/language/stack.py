"""Several methods read the same windows at once, so that the model's weights are read once.

The linear layers get the rows of all methods together. Attention runs method by method, each with
its own cache. A method sees the same tensors as under `kvcomp.patch`, and the results must be the
same; `kvcomp.reading.read` does it the plain way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcomp import Method
from kvcomp.cache import KVCache, Report
from kvcomp.hf.rotation import key_rotation
from language.door import attending, attends, causal
from language.rounding import KINDS


class Stack:
    """One batch under several methods.

    Args:
        kinds: of `KINDS`, how each keeps K and V; None: all as the model makes them.

    Attributes:
        caches: one for each method.
    """

    def __init__(self, model: Any, methods: list[Method], kinds: list[str] | None = None) -> None:
        self.model, self.methods = model, methods
        self.kinds = [KINDS[name] for name in kinds or ["model"] * len(methods)]
        layers = model.config.num_hidden_layers
        rotation = key_rotation(model) if any(m.moves_keys for m in methods) else None
        self.caches = [
            KVCache(method, layers, inv_freq=rotation, eight_bits=kind.eight_bits)
            for method, kind in zip(methods, self.kinds, strict=True)
        ]

    @torch.no_grad()
    def read(self, ids: Tensor, prompt: int, tick: Callable[[], None]) -> list[Tensor]:
        """Feed ids [B, tokens] one by one behind the prompt.

        Returns:
            hidden states [B, tokens - prompt - 1, width] of each method.
        """
        hidden = []
        with attending(self.model, self.attend):
            self._prompt(ids[:, :prompt])
            for place in range(prompt, ids.shape[1] - 1):
                token = ids[:, place : place + 1].repeat(len(self.caches), 1)
                hidden.append(self._step(token, place))
                tick()
        return list(torch.stack(hidden, 1).chunk(len(self.caches)))

    @torch.no_grad()
    def write(self, prompts: Tensor, count: int, tick: Callable[[], None]) -> list[Tensor]:
        """Decode greedily behind prompts [B, tokens].

        Returns:
            ids [B, count] of each method.
        """
        head, width = self.model.get_output_embeddings(), prompts.shape[1]
        with attending(self.model, self.attend):
            first = self._prompt(prompts)
            tokens = [head(first).argmax(-1, keepdim=True).repeat(len(self.caches), 1)]
            for place in range(width, width + count - 1):
                tokens.append(head(self._step(tokens[-1], place)).argmax(-1, keepdim=True))
                tick()
        return list(torch.cat(tokens, 1).chunk(len(self.caches)))

    def _prompt(self, ids: Tensor) -> Tensor:
        """The last hidden states [B, width] of the prompt, the same for all methods."""
        return self.model.get_decoder()(ids, use_cache=False).last_hidden_state[:, -1]

    def _step(self, tokens: Tensor, place: int) -> Tensor:
        """tokens [methods * B, 1] -> hidden states [methods * B, width]."""
        at = torch.full((1, 1), place, device=tokens.device)
        out = self.model.get_decoder()(tokens, position_ids=at, use_cache=False)
        return out.last_hidden_state[:, 0]

    def reports(self, seconds: float = 0.0) -> list[Report]:
        return [
            Report.of(method, cache.meter, seconds, False)
            for method, cache in zip(self.methods, self.caches, strict=True)
        ]

    def attend(self, position: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[rows, heads, n, D] -> [rows, n, heads, D]: the prompt's rows once, or each method's."""
        if q.shape[2] > 1:
            for cache, kind in zip(self.caches, self.kinds, strict=True):
                layer = cache.layers[position]
                layer.append(*kind.rounded(k, v))
                cache.prefill(layer, q, scale)
            return causal(q, k, v, scale)
        outs = []
        groups = zip(*(x.chunk(len(self.caches)) for x in (q, k, v)), strict=True)
        each = zip(self.caches, self.kinds, groups, strict=True)
        for cache, kind, (own_q, own_k, own_v) in each:
            layer = cache.layers[position]
            layer.append(*kind.rounded(own_k, own_v))
            outs.append(cache.attend(layer, own_q[:, :, 0].contiguous(), scale))
        return torch.cat(outs)[:, None]


def stackable(model: Any) -> bool:
    """Whether every layer attends to everything, with plain logits."""
    return attends(model, {"full_attention"})
