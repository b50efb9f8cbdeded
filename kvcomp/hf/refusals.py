"""Models that no method can decode exactly, and the reason that is given."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from kvcomp.hf.attention import NAME

HEAD_SIZES = (32, 64, 80, 96, 128, 256)


def refuse(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, for a model that no method can decode exactly."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    unknown = ", ".join(map(str, head_sizes(config) - set(HEAD_SIZES)))
    reasons = {
        "is patched already, or shares its config with a model that is; undo() the other run"
        " first": config._attn_implementation == NAME,
        "is multimodal; only text models are supported": config is not model.config,
        "is an encoder-decoder": model.config.is_encoder_decoder,
        "requires its own cache class": not model._supports_default_dynamic_cache(),
        "caches a latent instead of keys and values (MLA)": getattr(config, "kv_lora_rank", None),
        "shares K and V between layers": getattr(config, "num_kv_shared_layers", None),
        "caps its attention logits": getattr(config, "attn_logit_softcapping", None),
        "returns attention weights (output_attentions)": config.output_attentions,
        f"has heads of size {unknown}; supported are {HEAD_SIZES}": unknown,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"kvcomp.patch: {name} {reason}")


def head_sizes(config: PretrainedConfig) -> set[int]:
    """Of the layers that keep every token."""

    def size(layer: PretrainedConfig) -> int:
        return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads

    try:
        return {size(config)}
    except RuntimeError:  # layers differ: in Gemma 4 the sliding ones, whose heads nobody minds
        layers = zip(config.per_layer_config, config.layer_types, strict=True)
        return {size(layer) for layer, kind in layers if kind != "sliding_attention"}
