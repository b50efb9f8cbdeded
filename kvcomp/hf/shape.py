"""The shape of a model from its config alone.

The model is built on the meta device, where weights have sizes but take no memory. Then its
parameters are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcomp.hf.auto import auto_class
from kvcomp.hf.cache import WINDOW, Cache, is_dummy, is_linear
from kvcomp.hf.decoder import head_size, value_size, values_of
from kvcomp.hf.latent import latent_rank
from kvcomp.hf.layer import Layer
from kvcomp.hf.refusals import refuse
from kvcomp.methods import Method
from kvcomp.plan import Shape

# Names in configs for the number of routed experts in a layer and per token.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_k")


def shape_of(
    config: Any, *, name: str | None = None, dtype: str | None = None, weights: float | None = None
) -> Shape:
    """Read a transformers config. Needs neither weights nor a GPU.

    Args:
        config: the config of a causal LM.
        name: a name for display; default: the model class.
        dtype: data type of weights, K and V; default: the config's, else bfloat16.
        weights: bytes of all weights, if they are not stored in `dtype`.

    Raises:
        ValueError: a model that no method can decode (see `kvcomp.patch`): no attention, no
            full-attention layer, latent attention, and so on; or weights whose size the config does
            not tell.
    """
    text = config.get_text_config(decoder=True)
    name = name or type(config).__name__
    layers = per_layer(text)
    head_counts(layers[0], name)
    if weights is None and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"kvcomp.plan: {name} has quantized weights, and its config does not tell their"
            " bytes; give their size (--weights GB)"
        )
    kind = pick_dtype(dtype or getattr(text, "dtype", None))
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=kind)
    except Exception as error:  # any error of the model's code
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"kvcomp.plan: cannot build {name}: {reason}") from error
    cache = Cache(text, Method())
    refuse(model)
    managed = [index for index, layer in enumerate(cache.layers) if isinstance(layer, Layer)]
    sliding = [i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False)]
    heads, kv_heads, head_dim = the_same(name, [head_counts(layers[i], name) for i in managed])
    value_dim = values_beside(layers[managed[0]], head_dim)
    made = projected(model)
    rows = [(sum(made[i]),) if i in made else row_values(layers[i], name) for i in sliding]
    rows = rows or [(kv_heads * (head_dim + value_dim),)]
    reading = [i for i, layer in enumerate(cache.layers) if is_dummy(layer)]
    kinds = getattr(text, "layer_types", None) or [None] * len(layers)
    shape = Shape(
        name=name,
        dtype=str(kind).removeprefix("torch."),
        itemsize=kind.itemsize,
        layers=len(managed),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=tuple(getattr(cache.layers[index], WINDOW) for index in sliding),
        window_row=the_same(name, rows)[0],
        shared=sum(kinds[i] == "full_attention" for i in reading),
        shared_windows=tuple(
            layers[i].sliding_window for i in reading if kinds[i] == "sliding_attention"
        ),
        linear=sum(map(is_linear, cache.layers)),
        positions=getattr(text, "max_position_embeddings", None),
        **count_weights(model, text, name),
        value_dim=None if value_dim == head_dim else value_dim,
    )
    for i in managed:
        said = kv_heads * head_dim, kv_heads * values_beside(layers[i], head_dim)
        if i in made and made[i] != said:
            raise ValueError(
                f"kvcomp.plan: {name}: layer {i} has K and V of {made[i]} values a token, where its"
                f" config says {said}"
            )
    if weights is not None:
        share = weights / shape.weights
        shape = replace(
            shape,
            weights=int(weights),
            fixed=int(shape.fixed * share),
            routed=int(shape.routed * share),
        )
    return shape


def per_layer(config: Any) -> list[Any]:
    """The config of each layer."""
    count = getattr(config, "num_hidden_layers", None)
    try:
        values_differ = bool(config.per_layer_config)
    except Exception:  # of configs that say nothing of layers, and of older transformers
        values_differ = False
    return list(config.per_layer_config) if values_differ else [config] * (count or 1)


def the_same(name: str, sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes that all layers have; ValueError where they differ."""
    if len(set(sizes)) > 1:
        raise ValueError(f"kvcomp.plan: {name} has layers with heads of different sizes")
    return sizes[0]


def head_counts(config: Any, name: str) -> tuple[int, int, int]:
    """Query heads, KV heads and head size of a layer, from its config; where layers cache latents
    for all heads, one KV head of a row's size."""
    heads: Any = getattr(config, "num_attention_heads", None)
    kv_heads: Any = getattr(config, "num_key_value_heads", None) or heads
    head_dim: Any = head_size(config)
    if (rank := latent_rank(config)) is not None:
        kv_heads, head_dim = 1, rank + max(values_of(config, "qk_rope_head_dim"))
    if not all(isinstance(count, int) for count in (heads, kv_heads, head_dim)):
        raise ValueError(
            f"kvcomp.plan: {name}: {type(config).__name__} names no attention heads, or different"
            " ones per layer"
        )
    return heads, kv_heads, head_dim


def values_beside(config: Any, head_dim: int) -> int:
    """Values of V of a token and KV head beside keys of `head_dim`; none where V is a part of K."""
    return 0 if latent_rank(config) is not None else value_size(config) or head_dim


def row_values(config: Any, name: str) -> tuple[int]:
    """Values of K and V of a token in a layer."""
    _, kv_heads, head_dim = head_counts(config, name)
    return (kv_heads * (head_dim + values_beside(config, head_dim)),)


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.bfloat16
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"kvcomp.plan: dtype: expected float32, bfloat16, ..., got {dtype!r}")
    return kind


def count_weights(model: PreTrainedModel, config: Any, name: str) -> dict[str, Any]:
    """The fields of a Shape that count weights. An embedding is only looked up, so it is read as a
    whole only if it is also the LM head."""
    head = model.get_output_embeddings()
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    total = fixed = routed = 0
    for path, parameter in model.named_parameters():
        total += parameter.nbytes
        if ".experts." in path:
            routed += parameter.nbytes
        elif id(parameter) not in looked_up:
            fixed += parameter.nbytes
    counts = {"weights": total, "fixed": fixed, "routed": routed}
    if not routed:
        return {**counts, "parameters": fixed // model.dtype.itemsize}
    for field, known in (("experts", EXPERTS), ("active", ACTIVE)):
        found = next((getattr(config, key) for key in known if getattr(config, key, None)), None)
        if not isinstance(found, int):
            raise ValueError(
                f"kvcomp.plan: {name} routes to experts, and its config names no {known[0]}"
            )
        counts[field] = found
    passed = fixed + routed * counts["active"] // counts["experts"]
    return {**counts, "parameters": passed // model.dtype.itemsize}


def projected(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Values of K and of V of a token, by layer, where the model has a projection for each. What a
    config says may hold for the full-attention layers alone (MiMo-V2-Flash)."""
    found = {}
    for module in model.modules():
        index: Any = getattr(module, "layer_idx", None)
        k, v = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
        if isinstance(index, int) and isinstance(k, nn.Linear) and isinstance(v, nn.Linear):
            found[index] = k.out_features, v.out_features
    return found
