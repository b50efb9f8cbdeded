"""Tiny random-weight models to test on: `tiny_model("qwen3")`, or any other of `ARCHITECTURES`.

They have the real architecture's code and a few thousand parameters, so a method can be tried under
`generate` in seconds and without a download.
"""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# What every tiny model shares: grouped queries, a supported head size, a short vocabulary.
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # wide, so that greedy tokens depend on all of the context
}

_HYBRID = {
    "sliding_window": 16,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

# model type -> what it needs beyond COMMON
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "mistral": {"sliding_window": None},
    "gemma2": {**_HYBRID, "query_pre_attn_scalar": 32},
    "gemma3_text": {**_HYBRID, "query_pre_attn_scalar": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "gpt_oss": {**_MOE, **_HYBRID},
    "smollm3": {"sliding_window": None},
    "olmo3": _HYBRID,
    "glm4": {"partial_rotary_factor": 0.5},
    "granite": {},
    "cohere2": _HYBRID,
    "deepseek_v3": {
        "head_dim": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
    },
    "qwen3_next": {
        **_MOE,
        "num_hidden_layers": 6,
        "layer_types": ["linear_attention", "full_attention"] * 3,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
}

# The same, for architectures that show one thing only.
OTHERS: dict[str, dict] = {
    "diffllama": {},  # attends twice
    "gemma4_text": {  # sliding layers with heads of another size
        **_HYBRID,
        "global_head_dim": 64,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
    },
}

_MLA = {
    "num_key_value_heads": 4,
    "head_dim": 16,  # the rotated part's
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
_MLA_MOE = {
    **_MLA,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
}
_MLA_HYBRID = {
    **_MLA_MOE,
    "num_hidden_layers": 6,
    "layer_types": ["linear_attention", "full_attention"] * 3,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
}

# Architectures whose layers cache a latent for all heads (MLA), beside those above.
LATENT: dict[str, dict] = {
    "deepseek_v2": _MLA_MOE,
    "glm4_moe_lite": _MLA_MOE,
    "minicpm3": _MLA,
    "youtu": _MLA,
    "axk1": {**_MLA_MOE, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
    "longcat_flash": {
        **_MLA_MOE,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "kimi_linear": _MLA_HYBRID,
    "bailing_hybrid": {**_MLA_HYBRID, "num_shared_experts": 1},
}


def tiny_model(kind: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of the architecture, float32, on the CPU, in eval mode.

    Raises:
        ValueError: the installed transformers cannot make this configuration.
    """
    try:
        config = AutoConfig.for_model(
            kind, **{**COMMON, **(ARCHITECTURES | OTHERS | LATENT)[kind], **overrides}
        )
    except Exception as error:  # unknown, or its own validation is broken in that version
        raise ValueError(
            f"transformers {transformers.__version__} has no {kind}: {error}"
        ) from error
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None  # random weights would stop at random
    model.generation_config.pad_token_id = 0
    return model
