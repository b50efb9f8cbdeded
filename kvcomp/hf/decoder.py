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
    """The attention modules of a decoder, which know the number of their layer."""
    return [x for x in module.modules() if isinstance(getattr(x, "layer_idx", None), int)]


def values_of(config: PretrainedConfig, name: str) -> list[Any]:
    """The values of `name` in a config: one for all layers, one per layer if they differ, or none
    if the config has no such entry."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' form if layers differ
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [] if value is None else [value]
