"""The part of a model that runs its layers, and what its config says about them."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from transformers import PretrainedConfig, PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Module:
    """The module whose forward runs the layers. `get_decoder` names it, but in some models
    (ModernBERT's decoder) that is the LM head."""
    named = model.get_decoder()
    return next((found for found in (named, model.base_model) if attention_modules(found)), named)


def attention_modules(module: Module) -> list[Module]:
    """Its modules that know which layer they belong to."""
    return [x for x in module.modules() if isinstance(getattr(x, "layer_idx", None), int)]


def values_of(config: PretrainedConfig, name: str) -> list[Any]:
    """What a config says under `name`: one value for all layers, one for each where they differ,
    none where it does not say it."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # as transformers has it where layers differ
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [] if value is None else [value]
