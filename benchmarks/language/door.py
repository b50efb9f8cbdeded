"""A model whose attention is computed by a function of the benchmark, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvcomp-benchmark"
# layer, q [B, Hq, n, D], k and v [B, Hkv, n, D], scale -> out [B, n, Hq, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
_open: list[Attend] = []


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Within it, the layers of `model` call `attend`, without a mask."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    _open.append(attend)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _open.remove(attend)


def attends(model: Any, kinds: set[str]) -> bool:
    """Whether the layers of `model` are all of `kinds`, with plain logits."""
    config = model.config.get_text_config()
    own = set(getattr(config, "layer_types", None) or ["full_attention"])
    return own <= kinds and not getattr(config, "attn_logit_softcapping", None)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention to the newest `window` tokens, or all: q [B, Hq, n, D] -> [B, n, Hq, D]."""
    seen = None
    if window is not None:
        seen = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - window)
    out = scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _open[-1](module.layer_idx, query, key, value, scale), None
