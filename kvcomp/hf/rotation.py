"""The rotation of a model's keys, for methods that move keys to other positions."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcomp import ops
from kvcomp.hf.checkpoints import without_checkpoints
from kvcomp.hf.decoder import decoder_of

CHANGING = ("dynamic", "longrope")  # RoPE types whose frequencies depend on the length
NAMES = ("inv_freq", "full_attention_inv_freq")  # the second where sliding layers have their own
TEXT = 8  # tokens of the text for the trial


def key_rotation(model: PreTrainedModel) -> Tensor | None:
    """Radians per position [R / 2] fp32, or None if the model does not rotate in the usual way.

    The usual way has one set of frequencies for all full-attention layers (sliding layers may have
    another, as in Gemma 3), the same at every length, and pairs element i of a head with i + R / 2.
    The model's own `rotate_half` is checked for the pairing, and a short run of the model confirms
    it.
    """
    decoder = decoder_of(model)
    rotary = getattr(decoder, "rotary_emb", None)
    inv_freq = _frequencies(rotary)
    rotate_half = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    if inv_freq is None or rotate_half is None:
        return None
    if changes_with_length(model):
        return None
    x = torch.arange(1.0, 9.0)
    if not torch.equal(rotate_half(x), torch.cat([-x[4:], x[:4]])):
        return None
    inv_freq = inv_freq.detach().float()
    return inv_freq if _turns(model, inv_freq) else None


def changes_with_length(model: PreTrainedModel) -> bool:
    """Whether the frequencies of a layer's rotation depend on the length of the context."""
    kinds = getattr(getattr(decoder_of(model), "rotary_emb", None), "rope_type", "default")
    return any(
        kind in CHANGING for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
    )


def _frequencies(rotary: Any) -> Tensor | None:
    """The full-attention layers' frequencies, also where accelerate loads them for each forward."""
    name = next((name for name in NAMES if isinstance(getattr(rotary, name, None), Tensor)), None)
    if name is None:
        return None
    inv_freq = getattr(rotary, name)
    bring = getattr(rotary, "_hf_hook", None)
    if not inv_freq.is_meta or bring is None:
        return inv_freq
    bring.pre_forward(rotary)
    inv_freq = getattr(rotary, name).clone()
    bring.post_forward(rotary, None)
    return inv_freq


def _turns(model: PreTrainedModel, inv_freq: Tensor) -> bool:
    """Whether every full-attention layer rotates its keys this way; some models skip some layers.

    In a text that repeats one token all values are equal, so attention changes nothing, and the
    keys of a layer differ by their rotation alone.
    """
    config = model.config.get_text_config(decoder=True)
    ids = torch.full((1, TEXT), config.vocab_size // 2, device=inv_freq.device)
    cache = DynamicCache(config=config)
    with torch.no_grad(), without_checkpoints(model):
        decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.keys is not None:
            key, last = layer.keys[:, :, :1].clone(), layer.keys[:, :, -1:]
            apart = (last - key).norm()
            shift = torch.full((1,), TEXT - 1, device=key.device)
            ops.rotate_keys(key, shift, inv_freq.to(key.device))
            if not (last - key).norm() < apart / 2:  # not equal: half precision
                return False
    return True
