"""One attention function and one mask function, registered under one name.

The first forward of a sequence goes to the user's own implementation, with the same tensors. A
decode step goes to the method. In other forwards (a second turn, a prompt in chunks) the new tokens
attend to the tokens that the cache keeps. Drafts (assisted decoding, `Cache.stage`) go to the
method too, several steps at a time.
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
from kvcomp.cache.rows import Rows
from kvcomp.hf.cache import is_dummy
from kvcomp.hf.latent import Latents
from kvcomp.hf.layer import Context, Layer
from kvcomp.hf.outlast import outlasting
from kvcomp.methods import Method
from kvcomp.methods.base import definer
from kvcomp.ops.append_attention import MOST_QUERIES as MOST

if TYPE_CHECKING:
    from kvcomp.hf.run import Run

NAME = "kvcomp"

# Keywords of models that need more than softmax(scale * q k^T) v.
UNSUPPORTED = {
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
    layer = None if cache is None else cache.layer_of(module.layer_idx, key)
    source = None if cache is None or isinstance(layer, Layer) else cache.source(key)
    if source is not None:
        return _shared(run, module, source, query, attention_mask, scaling, **kwargs), None
    if cache is not None and is_dummy(layer) and kwargs.get("sliding_window") is None:
        raise ValueError(
            f"kvcomp: {type(module).__name__} attends to K and V that no layer of the cache has"
            " handed out: unsupported"
        )
    latents: Latents | None = module.__dict__.get("_kvcomp_latents")
    # A sliding layer, or a forward without a cache
    if cache is None or not isinstance(layer, Layer):
        if latents is not None:
            key, value = latents.expand(key, value)
        return _inner(run, module)(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    _refuse(module, kwargs)
    if not torch.compiler.is_compiling() and not cache.gives(attention_mask):
        raise ValueError(
            f"kvcomp: {type(module).__name__} makes an attention mask of its own, which says more"
            " than padding: unsupported"
        )
    fresh, layer.fresh = layer.fresh, None
    if fresh is None or key is not fresh[0] or value is not fresh[1]:
        raise ValueError(
            f"kvcomp: {type(module).__name__} changes K or V after the cache has stored them, or"
            " attends more than once: unsupported"
        )
    query = query.to(key.dtype)  # autocast leaves rotated queries in fp32
    tensors = query, key, value, attention_mask, cache.padding
    try:
        return _managed(run, module, layer, *tensors, scaling, **kwargs), None
    except HostMemoryError:
        run.undo()  # nothing was lost, and nothing stays patched
        raise


def _managed(
    run: Run,
    module: torch.nn.Module,
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    valid: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Attention over a managed layer that has the new tokens already: out [B, n, Hq, D]."""
    kv = layer.kv
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kv.sinks, kv.softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    latents: Latents | None = module.__dict__.get("_kvcomp_latents")
    decoding = query.shape[2] == 1 and not kv.first and not run.encoding
    asked = query  # of the cache, in the space of what it holds
    if latents is not None and (decoding or kv.staged or _reads_prompts(kv)):
        asked = latents.absorb(query)
    if kv.staged:
        drafts = layer.owner.packed_drafts
        if drafts is None:
            out = _verify(kv, asked, scale)
        else:
            out = drafts.packed(_verify(kv, drafts.rows(asked, 2), scale))
        return out if latents is None else latents.project(out)
    if decoding:
        out = _decode(kv, asked[:, :, 0], scale)
        return (out if latents is None else latents.project(out))[:, None]
    if kv.first:
        if latents is not None:
            key, value = latents.expand(key, value)
        given = (_inner(run, module), module, query, key, value, attention_mask)
        packing = layer.owner.packing
        if packing is not None:
            out = packing.attend(*given, scaling=scaling, **kwargs)
            asked = packing.rows(asked, 2)
        else:
            out, _ = given[0](*given[1:], scaling=scaling, **kwargs)
    elif latents is not None:
        out = attend_many_latents(latents, kv, query, valid, scale)
    else:
        context = _context(kv)
        if kv.is_shared:
            layer.context = context
        out = attend_many(kv, query, valid, scale, context)
    _prefill(kv, asked, scale)
    return out


def _shared(
    run: Run,
    module: torch.nn.Module,
    source: Layer,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """The same for a layer that has no K and V of its own, and attends to what `source` has
    attended to. Its queries [B, Hq, n, D] may be those of the last new tokens alone."""
    _refuse(module, kwargs)
    assert source.shared is not None, "it has handed them out"
    key, value = source.shared
    kv, query = source.kv, query.to(key.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kv.sinks, kv.softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    if kv.staged:
        raise ValueError(f"kvcomp: {type(module).__name__} shares K and V: no drafts")
    if source.context is not None:
        return attend_many(kv, query, source.owner.padding, scale, source.context)
    if not kv.first:
        return kv.attend_again(query[:, :, 0], scale)[:, None]
    inner = _inner(run, module)
    return inner(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]


def _refuse(module: torch.nn.Module, given: dict[str, Any]) -> None:
    for keyword, what in UNSUPPORTED.items():
        if given.get(keyword) is not None:
            raise ValueError(
                f"kvcomp: {type(module).__name__} uses {what} ({keyword}): unsupported"
            )


@outlasting
def _context(kv: LayerCache) -> Context:
    return kv.cache.method.context(kv)


def _reads_prompts(kv: LayerCache) -> bool:
    """Whether the method wants the queries of prompts, which are large where they are absorbed."""
    return definer(type(kv.cache.method), "prefill") is not Method


@outlasting
def _prefill(kv: LayerCache, query: Tensor, scale: float) -> None:
    kv.cache.prefill(kv, query, scale)


@outlasting
def _decode(kv: LayerCache, query: Tensor, scale: float) -> Tensor:
    return kv.cache.attend(kv, query, scale)


@outlasting
def _verify(kv: LayerCache, query: Tensor, scale: float) -> Tensor:
    return kv.cache.verify(kv, query, scale)


@outlasting
def attend_many(
    kv: LayerCache,
    query: Tensor,
    valid: Tensor | None,
    scale: float,
    context: Context | None = None,
) -> Tensor:
    """New tokens, already in `kv`, attend to the tokens kept before them and to each other.

    Args:
        query: [B, Hq, n, D], of the last n of them.
        valid: [B, n] bool, False for padding, or of more tokens; None: there is none.
        context: K, V and the tokens of each row; what the method says by default.

    Returns:
        out [B, n, Hq, D], 0 for padding.
    """
    rows, lens = kv.cache.method.context(kv) if context is None else context
    query, count = query.transpose(1, 2), query.shape[2]
    added = torch.full_like(lens, count)
    if valid is not None:
        valid = valid[:, -count:]
        added = valid.sum(1, dtype=lens.dtype)
        # A row's tokens first, as they are in the cache
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
        query = torch.take_along_dim(query, order, 1)
    pieces = [
        _piece(kv, query[:, first : first + MOST], rows, lens, added - first, scale)
        for first in range(0, count, MOST)
    ]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return out if valid is None else torch.take_along_dim(out, order.argsort(1), 1)


@outlasting
def attend_many_latents(
    latents: Latents, kv: LayerCache, query: Tensor, valid: Tensor | None, scale: float
) -> Tensor:
    """As `attend_many`, over a layer of latents, which are expanded for all of the new tokens."""
    (rows, *_), lens = kv.cache.method.context(kv)
    return latents.attend_many(query, rows, lens, kv.added, valid, scale)


def _piece(
    kv: LayerCache,
    query: Tensor,
    rows: Rows,
    lens: Tensor,
    left: Tensor,
    scale: float,
) -> Tensor:
    """Attention of up to MOST queries [B, m, Hq, D]; rows have `left` new tokens from there on."""
    count = query.shape[1]
    own, behind = left.clamp(0, count), (left - count).clamp(min=0)
    out, lse = ops.append_attention(
        kv.query(query),
        rows.k,
        rows.v,
        lens - behind,
        q_lens=own,
        scale=scale,
        words=rows.words,
        softcap=kv.softcap,
    )
    return kv.with_sinks(out, lse)[0]


def mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The mask that the run makes. Decode steps of managed layers ignore it."""
    run = RUNS.get(id(config))
    if run is None:
        raise RuntimeError(f"kvcomp: a config is set to {NAME!r} attention without kvcomp.patch")
    return run.mask(*args, config=config, **kwargs)


def _inner(run: Run, module: torch.nn.Module) -> Any:
    """The attention function of the user's implementation, looked up as the model would."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(run.inner_name, eager)


def register() -> None:
    """Register the name with transformers. Patching a model then selects it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
