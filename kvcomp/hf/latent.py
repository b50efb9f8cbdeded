"""Multi-head latent attention (MLA; DeepSeek-V2 and -V3, Kimi K2, GLM-4.7-Flash and others).

All such layers of transformers hand their cache a latent and a rotated key of each token, one for
all heads, and make K and V of what they get back with `expand_kv`. In a patched model that step is
left out, so that the latents come to our attention as they are: a prompt expands them there, a
decode step works on them without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from kvcomp.hf.decoder import attention_modules, values_of
from kvcomp.hf.linear import is_linear
from kvcomp.ops.latent_attention import MOST_COLUMNS, takes

EXPAND = "expand_kv"
QUERIES = 512  # at a time, so that no [n, T] matrix of a long turn is formed


def latent_rank(config: Any) -> int | None:
    """Columns of the latent that a model's layers cache; None: they cache K and V."""
    ranks = {rank for rank in values_of(config, "kv_lora_rank") if rank}
    return max(ranks, default=None)


def keeps_latents(module: Module) -> bool:
    return hasattr(module, EXPAND)


def as_stored(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """In place of a layer's `expand_kv`."""
    return latents, rotated


class Latents:
    """How one layer goes between the space of its heads and that of its latents.

    Args:
        module: an attention module as it was before patching.
    """

    def __init__(self, module: Any) -> None:
        self.expand = getattr(module, EXPAND)
        self._module = module

    @property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, Dn, rank] and W_UV [H, Dv, rank], which make K and V of a latent.

        Raises:
            ValueError: the projection does more than multiply by them, since it was patched.
        """
        require_absorbable(self._module)
        sizes = self._module.qk_nope_head_dim, self._module.v_head_dim
        weight = self._module.kv_b_proj.weight
        w_uk, w_uv = weight.unflatten(0, (-1, sum(sizes))).split(sizes, 1)
        return w_uk, w_uv

    def absorb(self, query: Tensor) -> Tensor:
        """Queries [B, H, n, Dn + R] as latents see them: [B, H, n, rank + R]."""
        w_uk, _ = self._weights
        unrotated, rotated = query.split((w_uk.shape[1], query.shape[3] - w_uk.shape[1]), 3)
        return torch.cat([torch.einsum("bhnd,hdr->bhnr", unrotated, w_uk), rotated], 3)

    def project(self, out: Tensor) -> Tensor:
        """Sums of latents [..., H, rank] as outputs of heads: [..., H, Dv]."""
        return torch.einsum("...hr,hdr->...hd", out, self._weights[1])

    def attend_many(
        self,
        query: Tensor,
        rows: Tensor,
        lens: Tensor,
        added: int | Tensor,
        valid: Tensor | None,
        scale: float,
    ) -> Tensor:
        """n new tokens over rows of latents, in which they are the last ones.

        Args:
            query: [B, H, n, Dn + R].
            rows: [B, 1, T, rank + R]; row b is valid up to lens[b].
            lens, added: [B], all tokens and how many of them are new.
            valid: [B, n] bool, False for padding; None: there is none.

        Returns:
            out [B, n, H, Dv], 0 for padding.
        """
        rank = self._weights[0].shape[2]
        key, value = self.expand(rows[..., :rank], rows[..., rank:])
        count = query.shape[2]
        if valid is None:
            valid = torch.ones(len(lens), count, dtype=torch.bool, device=query.device)
        own = (lens - added)[:, None] + valid.cumsum(1) - 1  # slot of each query's own token
        slot = torch.arange(rows.shape[2], device=query.device)
        pieces = []
        for first in range(0, count, QUERIES):
            part = slice(first, first + QUERIES)
            seen = (slot <= own[:, part, None])[:, None]
            pieces.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, part], key, value, attn_mask=seen, scale=scale
                )
            )
        out = torch.cat(pieces, 2).transpose(1, 2)
        return out.masked_fill(~valid[..., None, None], 0.0)


def refuse_latents(model: Any) -> None:
    """Raise ValueError, with the reason, for layers whose latents cannot be attended as such."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    rank = latent_rank(config) or 0
    rotated = max(filter(None, values_of(config, "qk_rope_head_dim")), default=0)
    if not takes(rank + rotated, rank):
        raise ValueError(
            f"kvcomp.patch: {name} caches latents of {rank} columns and rotated keys of {rotated}"
            f" (MLA); supported are multiples of 16, together at most {MOST_COLUMNS}"
        )
    for module in attention_modules(model):
        if not hasattr(module, "kv_b_proj"):
            continue
        if not keeps_latents(module):
            raise ValueError(
                f"kvcomp.patch: {name} expands its latents (MLA) before they are cached, or in a"
                f" way of its own: {type(module).__name__} has no {EXPAND}"
            )
        require_absorbable(module)


def require_absorbable(module: Any) -> None:
    """Raise ValueError if an attention module's `kv_b_proj` is more than its weight."""
    projection = module.kv_b_proj
    if not is_linear(projection) or projection.bias is not None:
        raise ValueError(
            f"kvcomp: layer {module.layer_idx} expands its latents (MLA) by"
            f" {type(projection).__name__}; a decode step absorbs it into the queries, which takes"
            " a plain linear layer in memory, without a bias, hooks or another forward (merge"
            " adapters, leave it unquantized)"
        )
