"""The Auto class of transformers that a config belongs to."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)


def auto_class(config: PretrainedConfig) -> Any:
    """`AutoModelForCausalLM` where it knows the config, else the class for models that also read
    images, which decode text as well."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM  # whose error says what it knows
