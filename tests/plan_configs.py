"""Configs of published models, and numbers as they are printed."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import AutoConfig

from kvcomp.hf.shape import shape_of
from kvcomp.plan import DEVICES

H200 = DEVICES["h200"]
CONFIGS = {
    "Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
QWEN3, R1_7B, R1_1B = CONFIGS


def make_shape(name, **changes):
    fields = {**CONFIGS[name], **changes}
    return shape_of(AutoConfig.for_model(fields.pop("model_type"), **fields), name=name)


def agrees(value, printed):
    """Within the rounding of what is printed, and half a per cent."""
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-decimals + 0.005 * value
