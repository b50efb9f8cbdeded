"""The part of a model that runs its layers, and their values in its config."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from transformers import PretrainedConfig, PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Module:
    """The module whose forward runs the layers. Usually `get_decoder` returns it; in some models
    (ModernBERT's decoder) that returns the LM head."""
    named = model.get_decoder()
    return next((found for found in (named, model.base_model) if attention_modules(found)), named)


def attention_modules(module: Module) -> list[Module]:
    """The attention modules of a decoder, which know the number of their layer; -1 or None where
    they serve several and each call tells it."""
    return [x for x in module.modules() if _attends(x)]


def _attends(module: Module) -> bool:
    number = getattr(module, "layer_idx", "")
    return isinstance(number, int) or (number is None and "Attention" in type(module).__name__)


def head_size(config: Any) -> Any:
    """Elements of a head in a layer with this config; None if it does not say."""
    for name in ("attention_head_dim", "head_dim"):  # the former where attention is wider: Zamba2
        if getattr(config, name, None):
            return getattr(config, name)
    heads, width = (getattr(config, x, None) for x in ("num_attention_heads", "hidden_size"))
    return width // heads if width and heads else None


def value_size(config: Any) -> Any:
    """Elements of a head's V in a layer with this config; None where they are as many as K's."""
    return getattr(config, "v_head_dim", None)


def values_of(config: PretrainedConfig, name: str) -> list[Any]:
    """The values of `name` in a config: one for all layers, one per layer if they differ, or none
    if the config has no such entry."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' form if layers differ
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [] if value is None else [value]
