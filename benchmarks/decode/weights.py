"""A model's weights as a GGUF file, for the engines that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

NAMES = {"qwen3": "QWEN3", "qwen2": "QWEN2", "llama": "LLAMA"}  # of architectures, in gguf


def write_gguf(model: PreTrainedModel, path: Path, tokenizer: Path | None = None) -> None:
    """The matrices in fp16, norms and biases in fp32.

    Args:
        tokenizer: a tokenizer.json with merges; None: the file has no vocabulary.
    """
    import gguf

    config, kind = model.config, model.config.model_type
    dim = model.get_decoder().layers[0].self_attn.head_dim
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _add_vocabulary(writer, tokenizer, model)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, NAMES[kind]), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _neighbours(tensor, dim)
        wide = tensor.ndim == 1
        writer.add_tensor(known, (tensor.float() if wide else tensor.half()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(weight: Tensor, dim: int) -> Tensor:
    """Rows in the order in which llama.cpp rotates a Llama's heads: elements 2i and 2i + 1."""
    return weight.view(-1, 2, dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_vocabulary(writer: object, file: Path, model: PreTrainedModel) -> None:
    import gguf

    known = json.loads(file.read_text())
    tokens = [f"[PAD{i}]" for i in range(model.config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, number in known["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in known["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in known["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ends = model.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    writer.add_bos_token_id(model.config.bos_token_id or first)
    writer.add_eos_token_id(first)
    writer.add_add_bos_token(False)
