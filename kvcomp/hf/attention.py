"""One attention function and one mask function, registered under one name.

The first forward of a sequence goes to the implementation that the user had, on the very tensors
it would have seen. A decode step goes to the method. In between (a second turn, a prompt in
chunks, the checks of assisted decoding) the new tokens attend to what the cache keeps.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcomp import ops
from kvcomp.cache import HostMemoryError, LayerCache
from kvcomp.hf.cache import Layer

if TYPE_CHECKING:
    from kvcomp.hf.run import Run

NAME = "kvcomp"
FEW = 64  # new tokens, up to which one pass over the cache beats a copy of it and blocked products

# Keywords by which a model asks for more than softmax(scale * q k^T) v.
UNSUPPORTED = {
    "softcap": "a soft cap on the logits",
    "position_bias": "a position bias on the logits",
}

RUNS: dict[int, Run] = {}  # id of a patched model's config -> its run, for the mask function


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, Hq, n, D] -> ([B, n, Hq, D], None)."""
    run: Run | None = module.__dict__.get("_kvcomp_run")
    if run is None:
        raise RuntimeError(
            f"kvcomp: {type(module).__name__} is set to {NAME!r} attention without kvcomp.patch"
        )
    cache = run.current
    layer = cache.layers[module.layer_idx] if cache is not None else None
    if not isinstance(layer, Layer):  # a sliding layer, or a forward without a cache
        return _inner(run, module)(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    for keyword, what in UNSUPPORTED.items():
        if kwargs.get(keyword) is not None:
            raise ValueError(
                f"kvcomp: {type(module).__name__} uses {what} ({keyword}): unsupported"
            )
    fresh, layer.fresh = layer.fresh, None
    if fresh is None or key is not fresh[0] or value is not fresh[1]:
        raise ValueError(
            f"kvcomp: {type(module).__name__} changes K or V after the cache has stored them, or"
            " attends more than once: unsupported"
        )
    kv = layer.kv
    try:
        return _managed(run, module, kv, query, key, value, attention_mask, scaling, **kwargs), None
    except HostMemoryError:
        run.undo()  # nothing was lost, and nothing stays patched
        raise


def _managed(
    run: Run,
    module: torch.nn.Module,
    kv: LayerCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Attention over a layer of ours, in which the new tokens already are: out [B, n, Hq, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kv.sinks = kwargs.get("s_aux")
    if query.shape[2] == 1 and not kv.first and not run.encoding:
        return kv.cache.attend(kv, query[:, :, 0], scale)[:, None]
    if kv.first:
        out, _ = _inner(run, module)(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    else:
        out = attend_many(kv, query, key, value, run.current.padding, scale)
    kv.cache.prefill(kv, query, scale)
    return out


def attend_many(
    kv: LayerCache, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float
) -> Tensor:
    """n new tokens, already in `kv`, attend to the tokens kept before them and to each other.

    Returns:
        out [B, n, Hq, D]; rows of padding hold anything finite.
    """
    past_keys, past_values, past_lens = kv.cache.method.context(kv)
    copies = past_keys.shape[1] // key.shape[1]  # see LayerCache.repeat_heads
    key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
    causal = torch.ones(*[query.shape[2]] * 2, dtype=torch.bool, device=query.device).tril()
    if valid is not None:
        causal = causal & valid[:, None]
    causal = causal.expand(query.shape[0], -1, -1)
    given = query, key, value, causal, past_keys, past_values, past_lens, scale
    return (_together if query.shape[2] <= FEW else _concatenated)(kv, *given)


def _together(
    kv: LayerCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    past_lens: Tensor,
    scale: float,
) -> Tensor:
    """Few tokens: to what was kept before they are so many query heads more, in one call of the
    kernel that reads it once; what they see of each other is merged with that."""
    shape = query.shape  # the heads of a KV head are neighbours, and so are their tokens
    out, lse = ops.decode_attention(
        query.flatten(1, 2), past_keys, past_values, past_lens, scale=scale
    )
    key, value, query = key.float(), value.float(), query.float()
    logits = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-1, -2) * scale
    logits = logits.masked_fill(~causal[:, None, None], -torch.inf)
    tail_lse = logits.logsumexp(-1, keepdim=True)
    base = tail_lse.masked_fill(tail_lse == -torch.inf, 0.0)
    tail = (logits - base).exp() @ value[:, :, None]
    tail = tail.to(out.dtype).view_as(out), tail_lse.view_as(lse)
    out, lse = ops.merge_states(out, lse, *tail)
    if kv.sinks is not None:
        sinks = kv.sinks.detach().float().repeat_interleave(shape[2]).expand_as(lse).contiguous()
        out, _ = ops.merge_states(out, lse, torch.zeros_like(out), sinks)
    return out.view(shape).transpose(1, 2)


def _concatenated(
    kv: LayerCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    past_lens: Tensor,
    scale: float,
) -> Tensor:
    """Many tokens: matrix products over a copy of all K and V."""
    slot = torch.arange(past_keys.shape[2], device=query.device)
    past = slot < past_lens[:, None]  # [B, slots]
    mask = torch.cat([past[:, None].expand(-1, query.shape[2], -1), causal], -1)
    key, value = torch.cat([past_keys, key], 2), torch.cat([past_values, value], 2)
    mask = mask[:, None]
    if kv.sinks is not None:  # a last token of zeros, whose logits they are
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
        mask = _with_sinks(mask, kv.sinks.to(query.dtype))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _with_sinks(mask: Tensor, sinks: Tensor) -> Tensor:
    """[B, 1, n, T] bool and [Hq] -> what to add to logits [B, Hq, n, T + 1]."""
    bias = sinks.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    bias = bias.expand(-1, len(sinks), -1, -1)
    return torch.cat([bias, sinks[:, None, None].expand(*bias.shape[:3], 1)], -1)


def mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """What the run says; decode steps of our layers ignore it."""
    run = RUNS.get(id(config))
    if run is None:
        raise RuntimeError(f"kvcomp: a config is set to {NAME!r} attention without kvcomp.patch")
    return run.mask(*args, config=config, **kwargs)


def _inner(run: Run, module: torch.nn.Module) -> Any:
    """The attention function that the user had, as the model itself would have found it."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(run.inner_name, eager)


def register() -> None:
    """Make the name known to transformers; patching a model puts it to use."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
