"""A tiny random model of any type that transformers has, made from its config class alone.

`shrunken` asks the class for the sizes it knows by name, in sub-configs too, and gives them small
values; `PARTICULAR` has what a type needs beyond that.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FULL = "full_attention"
LAYERS, WINDOW, VOCABULARY = 4, 16, 128

# names that configs give to a size -> the size here; other names keep their defaults
SIZES: dict[tuple[str, ...], Any] = {
    ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"): VOCABULARY,
    (
        "hidden_size",
        "d_model",
        "n_embd",
        "embed_dim",
        "model_dim",
        "embedding_size",
        "emb_dim",
    ): 128,
    ("hidden_size_global",): 128,
    ("encoder_hash_byte_group_vocab",): 64,
    ("word_embed_proj_dim", "rnn_hidden_size", "lru_width", "output_hidden_size"): 128,
    ("intermediate_size", "ffn_dim", "n_inner", "dim_ff", "ffn_hidden_size"): 96,
    ("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size"): 96,
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers"): LAYERS,
    ("encoder_layers", "decoder_layers"): LAYERS,
    ("num_attention_heads", "n_head", "num_heads", "n_heads"): 4,
    ("encoder_attention_heads", "decoder_attention_heads"): 4,
    ("num_key_value_heads", "num_global_key_value_heads", "n_head_kv"): 2,
    ("head_dim", "dim_head", "attention_head_dim"): 32,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"): 512,
    ("sliding_window", "attention_window_size", "window_size"): WINDOW,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"): 2,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"): 32,
    ("moe_shared_expert_intermediate_size",): 32,
    ("first_k_dense_replace", "num_shared_experts", "n_shared_experts"): 1,
    ("n_group", "topk_group", "num_expert_group", "moe_num_shared_experts"): 1,
    ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"): 16,
    ("global_head_dim",): 64,
    ("share_expert_dim", "num_sliding_attention_heads"): (32, 4),
    ("v_head_dim", "index_head_dim"): 32,
    ("linear_num_key_heads",): 2,
    ("linear_num_value_heads", "linear_num_heads"): 4,
    ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"): 16,
    ("mamba_n_heads", "mamba_num_heads"): 8,
    ("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"): 16,
    ("mamba_n_groups", "n_groups", "mamba_ngroups"): 2,
    ("hidden_size_per_layer_input", "altup_lauf_size", "laurel_rank"): 16,
    ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout"): 0.0,
    ("tie_word_embeddings",): False,
    ("query_pre_attn_scalar",): 32,
    ("attention_multiplier",): 0.2,
    ("pad_token_id", "bos_token_id", "eos_token_id"): (0, 1, 2),
    # towers for images and sounds, which text never enters
    ("depth", "num_blocks"): 1,
    ("image_size", "image_resolution"): 32,
    ("patch_size",): 16,
    ("out_hidden_size", "projection_dim", "proj_dim", "text_hidden_size"): 128,
}
BY_NAME = {
    name: value[place] if isinstance(value, tuple) else value
    for names, value in SIZES.items()
    for place, name in enumerate(names)
}

SLIDING, INDEXED = "sliding_attention", "indexed_attention"
MIXED = {"num_hidden_layers": 5, "layer_types": ["linear_attention", *[FULL] * 4]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
BY_DEFAULT_NONE = {
    *("num_key_value_heads", "head_dim", "pad_token_id"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts"),
}

PARTICULAR: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
    "qwen2_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
    "glm4v_text": {"rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
    "glm4v_moe_text": {
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    },
    "bamba": {"mamba_n_heads": 16, "num_hidden_layers": 5, "attn_layer_indices": [1, 2, 3, 4]},
    "granitemoehybrid": {"mamba_n_heads": 16, **MIXED},
    "lfm2_moe": {**MIXED, "layer_types": ["conv", *[FULL] * 4]},
    "cohere_compass_text": {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}},
    "gemma3n_text": {"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.0] * 5},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", FULL, "mlp", *[FULL] * 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "num_hidden_layers": 4,
        "layer_types": [INDEXED, SLIDING, INDEXED, INDEXED],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        **{"per_layer_config": {}, "head_dim": 32},
    },
    "qwen4_exp_text": {
        **{"num_hidden_layers": 5, "layer_types": ["linear_attention", *[INDEXED] * 4]},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32},
        **{"indexer_budget": 32, "indexer_compress_ratio": 4, "output_gate_type": "sigmoid"},
    },
    "reformer": {
        **{"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 32},
        **{"attn_layers": ["local", "lsh"] * 2, "feed_forward_size": 96},
    },
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 16, "head_dim": 16},
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 16},
    "mimo_v2_flash": {"head_dim": 192, "v_head_dim": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4},
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 1, "expert_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", *["hybrid"] * 4]},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1},
    "dots3_note_vision_encoder": {
        **{"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
        **{"num_experts_per_tok": 2, "per_layer_config": {}},
        **{"adapter_in_dim": 128, "adapter_out_dim": 128},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 128, "adapter_out_dim": 128},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        **{"num_hidden_layers": 5, "layers_block_type": ["linear_attention", *["hybrid"] * 4]},
        **{"num_mem_blocks": 2, "n_mamba_heads": 16, "chunk_size": 16, "use_mem_rope": True},
        **{
            "use_shared_attention_adapter": True,
            "adapter_rank": 8,
            "attention_head_dim": 64,
            "num_key_value_heads": 4,
        },
    },
    "step3p5": {
        "num_hidden_layers": 5,
        "sliding_window": WINDOW,
        "layer_types": [FULL, "sliding_attention", FULL, FULL, FULL],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"],
    },
}


MOST = 16_000_000  # parameters; a type with more has a size that `SIZES` does not know


def shrunken(default: Any, **more: Any) -> Any:
    """A config like `default`, of its class, with the sizes of `SIZES`. What is None stays None,
    such as a window that a type does not have."""
    given: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            given[name] = shrunken(value)
        elif name in BY_NAME and (value is not None or name in BY_DEFAULT_NONE):
            given[name] = BY_NAME[name]
    if "kv_lora_rank" in vars(default):  # latent attention
        given |= {"num_key_value_heads": 4, "head_dim": 16}
    given |= layers_of(default)
    if isinstance(text := given.get("text_config"), PretrainedConfig):
        for name in given.keys() & {"hidden_size", "vocab_size"}:
            given[name] = getattr(text, name)
    return type(default)(**given | PARTICULAR.get(default.model_type, {}) | more)


def layers_of(default: Any) -> dict[str, Any]:
    """Layers of every kind, and four with full attention, so that methods have something to do."""
    kinds = vars(default).get("layer_types")
    if not isinstance(kinds, list) or FULL not in kinds:
        return {}
    others = sorted(set(kinds) - {FULL})
    chosen = [FULL, *others, FULL, FULL, FULL]
    given: dict[str, Any] = {"num_hidden_layers": len(chosen), "layer_types": chosen}
    for name, value in vars(default).items():
        told = name in given or name in BY_NAME
        if isinstance(value, list) and len(value) == len(kinds) and not told:
            given[name] = value[-len(chosen) :]
    return given


def tiny_config(kind: str, **more: Any) -> Any:
    """A config of the type, which a few thousand parameters fill."""
    return shrunken(CONFIG_MAPPING[kind](), **more)


def tiny(build: Any, kind: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """`build` is an Auto class. The model is in float32, its 1-D weights away from 0 and 1, and
    the others are so wide that every token depends on what came before."""
    config = tiny_config(kind, **more)
    with torch.device("meta"):
        count = sum(x.numel() for x in build.from_config(deepcopy(config)).parameters())
    assert count < MOST, f"{kind} has {count} parameters: a size is missing in SIZES"
    torch.manual_seed(seed)
    model = build.from_config(config).eval()
    scatter(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    return model


def scatter(model: PreTrainedModel) -> None:
    """Weights at random."""
    with torch.no_grad():
        for x in model.parameters():
            noise = torch.randn_like(x)
            x.copy_(noise * 1.6 / x.shape[-1] ** 0.5 if x.ndim > 1 else x + 0.2 * noise)
