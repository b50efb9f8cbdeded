"""Models of real shapes with random weights, and what they must read at every step."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# name -> (model type, configuration)
SHAPES: dict[str, tuple[str, dict]] = {
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "r1-distill-qwen-1.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        "qwen3",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
}


def make_model(shape: str, dtype: torch.dtype, device: str, seed: int) -> PreTrainedModel:
    kind, fields = SHAPES[shape]
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=dtype)
    settings = model.generation_config  # Delethink wants to know how thinking ends
    settings.eos_token_id, settings.pad_token_id = fields["vocab_size"] - 1, 0
    return model.eval()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model of its own, so that one can be patched while the other is not."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def weight_bytes(model: PreTrainedModel) -> int:
    """Of what a step reads whole: linear layers and LM head, once for all rows of a batch."""
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    return sum(parameter.nbytes for module in linear for parameter in module.parameters())


def token_bytes(model: PreTrainedModel) -> int:
    """K and V of one token of one sequence, all layers."""
    config, attention = model.config, model.get_decoder().layers[0].self_attn
    per_layer = 2 * config.num_key_value_heads * attention.head_dim
    return config.num_hidden_layers * per_layer * model.dtype.itemsize
