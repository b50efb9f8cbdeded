"""Refusals of models that no method can decode exactly, each with its reason."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationMixin, LogitsProcessor, PretrainedConfig, PreTrainedModel

from kvcomp.hf.attention import NAME
from kvcomp.hf.branches import masks_by_name
from kvcomp.hf.cache import Cache
from kvcomp.hf.decoder import attention_modules, decoder_of, head_size, value_size, values_of
from kvcomp.hf.latent import latent_rank, refuse_latents
from kvcomp.methods import Method
from kvcomp.ops import HEAD_SIZES, UNLIKE_SIZES


def refuse(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, for a model that no method can decode exactly."""
    config = model.config.get_text_config(decoder=True)
    name, generative = type(model).__name__, cast("Any", model)
    eager = config._attn_implementation == "eager"
    capped = any(values_of(config, "attn_logit_softcapping"))
    attentions = attention_modules(decoder_of(model))
    reasons = {
        "is patched already, or shares its config with a model that is; undo() the other run"
        " first": config._attn_implementation == NAME,
        "is multimodal, and its text part is no model that transformers could put another"
        " attention into": decoder_of(model).config is not config,
        "has a `generate` of its own; patch its text model instead (model.language_model), and"
        " generate with that": config is not model.config and not _inherits(model),
        "is an encoder-decoder": model.config.is_encoder_decoder,
        "requires its own cache class": not generative._supports_default_dynamic_cache(),
        "says nothing of its layers (num_hidden_layers)": not hasattr(config, "num_hidden_layers"),
        "caps its attention logits, and keeps latents": capped and latent_rank(config) is not None,
        "computes eager attention by itself (reorder_and_upcast_attn)": eager
        and any(values_of(config, "reorder_and_upcast_attn")),
        "is in float64, which no kernel attends in; load it in float32": any(
            x.dtype == torch.float64 for module in attentions for x in module.parameters()
        ),
        "returns attention weights (output_attentions)": config.output_attentions,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"kvcomp.patch: {name} {reason}")
    Cache(config, Method())  # it refuses unknown layers
    if (where := masks_by_name(decoder_of(model))) is not None:
        raise ValueError(
            f"kvcomp.patch: {name} makes another attention mask for some attention implementations"
            f" ({where}), so that it may see other tokens: unsupported"
        )
    if latent_rank(config) is not None:
        refuse_latents(model)
    else:
        refuse_sizes(model)


def refuse_sizes(model: PreTrainedModel) -> None:
    """Raise ValueError for sizes of K and V that attention is not compiled for."""
    name = type(model).__name__
    sizes = head_sizes(model.config.get_text_config(decoder=True))
    unlike = {both for both in sizes if both[0] != both[1]}
    if unknown := ", ".join(str(k) for k, _ in sizes - unlike if k not in HEAD_SIZES):
        raise ValueError(
            f"kvcomp.patch: {name} has heads of size {unknown}; supported are {HEAD_SIZES}"
        )
    if unknown := ", ".join(f"{k} and {v}" for k, v in unlike - set(UNLIKE_SIZES)):
        known = ", ".join(f"{k} and {v}" for k, v in UNLIKE_SIZES)
        raise ValueError(
            f"kvcomp.patch: {name} has keys and values of sizes {unknown}; of those that differ"
            f" only {known} are supported"
        )


def _inherits(model: Any) -> bool:
    """Whether a model decodes with transformers' own `generate`."""
    return type(model).generate is GenerationMixin.generate


def unwrapped(model: Any) -> Any:
    """The transformers model in a PEFT model, whose `generate` and forward go through it."""
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    refuse_prefixes(model)
    return model.get_base_model()


def refuse_prefixes(model: Any) -> None:
    """Raise ValueError for prefix tuning, of a PEFT model or of the model in one.

    PEFT replaces the model's `prepare_inputs_for_generation` by its own.
    """
    step = getattr(model, "prepare_inputs_for_generation", None)
    for owner in (model, getattr(step, "__self__", None)):
        tuned = getattr(owner, "active_peft_config", None)
        if getattr(getattr(tuned, "peft_type", None), "value", None) == "PREFIX_TUNING":
            raise ValueError(
                "kvcomp: prefix tuning brings keys and values that no layer has computed, in a"
                " cache of its own: unsupported. Adapters such as LoRA are supported, and so are"
                " prompts of embeddings"
            )


def head_sizes(config: PretrainedConfig) -> set[tuple[int, int]]:
    """Sizes of a head's K and V in the layers that keep every token; empty if the config does not
    say."""

    def size(layer: PretrainedConfig) -> set[tuple[int, int]]:
        known = head_size(layer)
        return {(known, value_size(layer) or known)} if known else set()

    try:
        return size(config)
    except RuntimeError:  # layers differ: in Gemma 4 the sliding ones, whose heads nobody minds
        layers = zip(config.per_layer_config, config.layer_types, strict=True)
        return set().union(*(size(layer) for layer, kind in layers if kind != "sliding_attention"))


def refuse_misplaced(loop: Any, processors: Any) -> None:
    """Raise ValueError for a logits processor given to `generate` as its loop, or for a loop
    (`replaces_loop`) given as a processor."""
    if isinstance(loop, LogitsProcessor) and not getattr(loop, "replaces_loop", False):
        raise ValueError(
            "kvcomp: generate: custom_generate: expected a decoding loop, got the logits processor"
            f" {type(loop).__name__}; pass it as logits_processor=[...]"
        )
    for each in processors or ():
        if getattr(each, "replaces_loop", False):
            raise ValueError(
                "kvcomp: generate: logits_processor: expected functions of logits, got the decoding"
                f" loop {type(each).__name__.strip('_')}; pass it as custom_generate=..."
            )
