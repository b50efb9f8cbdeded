"""Which layers of a model a method runs, and what the server was asked for; for every backend.

A backend is asked for classes and block sizes where vLLM has no configuration at hand, so what a
worker was asked for is remembered here. Layers with full attention and nothing besides are
*managed*; layers with a window, chunks, sinks, a soft cap, ALiBi or an 8-bit cache stay with vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcomp import Delta, LazyEviction
from kvcomp.engines.vllm.blocks import LeavingSpec
from kvcomp.engines.vllm.lazy import LazyLayer
from kvcomp.engines.vllm.settings import Settings
from kvcomp.engines.vllm.step import PlacedLayer, PlacedModel
from kvcomp.ops import HEAD_SIZES

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own, or nothing would print it

_asked: Settings | None = None  # by the server of this process; vLLM runs one model in a worker


def asked() -> Settings | None:
    """The settings of this worker; some hooks are called where vLLM has no current configuration.

    Raises:
        ValueError, TypeError: settings that cannot be, or that this server cannot run.
    """
    global _asked
    if (config := get_current_vllm_config_or_none()) is not None:
        _asked = Settings.of(config)
        if _asked is not None:
            _asked.refuse(config)
    return _asked


def page_sizes(kv_cache_spec: Any) -> list[int] | None:
    """What a backend takes for blocks: a number, not a multiple, so that vLLM gives block tables
    that count pages of that size. None: as the stock backend does."""
    settings = asked()
    if settings is None or not (
        kv_cache_spec is None or isinstance(kv_cache_spec, FullAttentionSpec)
    ):
        return None
    return [settings.page_size]


def manageable(impl: Any, windowed: bool) -> bool:
    """Whether an attention layer of vLLM has full attention and nothing besides."""
    return (
        impl.attn_type == AttentionType.DECODER
        and not windowed
        and impl.alibi_slopes is None
        and not impl.logits_soft_cap
        and impl.sinks is None
        and not is_quantized_kv_cache(impl.kv_cache_dtype)
        and impl.kv_sharing_target_layer_name is None
        and impl.head_size in HEAD_SIZES
    )


def check_others(others: set[str], spec: Any, page_size: int) -> None:
    """Raise ValueError where vLLM cannot keep `others`, layers in one group with managed ones."""
    if not others:
        return
    name = min(others)
    if isinstance(spec, LeavingSpec):
        raise ValueError(
            f"kvcomp.engines.vllm: {spec.method!r}: vLLM keeps {name}, which reads all tokens and"
            " has its blocks in common with layers that lose them"
        )
    if page_size % 16:
        raise ValueError(
            f"kvcomp.engines.vllm: page_size: expected a multiple of 16, as vLLM's kernel keeps"
            f" {name} and has no other pages, got {page_size}"
        )


def place_layers(
    vllm_config: Any, settings: Settings, device: torch.device | str = "cpu"
) -> set[str]:
    """Give every managed layer of the model its part; their names.

    Each group of layers has a builder, and all of them come here: the first one places.

    Raises:
        ValueError: a model without such a layer, or one that the method does not fit.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    for layer in layers.values():
        if type(layer) is not Attention:  # it changes the batch: chunks, learned sinks, prefixes
            layer.impl.managed = False
        if target := layer.kv_sharing_target_layer_name:  # read as vLLM's own kernels write it
            layers[target].impl.managed = False
    names = [name for name, layer in layers.items() if getattr(layer.impl, "managed", False)]
    names.sort(key=extract_layer_index)
    if not names:
        raise ValueError(
            f"kvcomp.engines.vllm: {settings.method!r}: the model has no layer with full attention"
            f" and nothing besides, with heads of {', '.join(map(str, HEAD_SIZES))}"
        )
    if layers[names[0]].impl.placed is None:
        method = settings.method
        if isinstance(method, Delta) and vllm_config.parallel_config.tensor_parallel_size > 1:
            from vllm.distributed.parallel_state import get_tp_group

            ranks = get_tp_group()
            on_cpu = torch.device(device).type == "cpu"
            method = replace(method, group=ranks.cpu_group if on_cpu else ranks.device_group)
        kind = LazyLayer if isinstance(method, LazyEviction) else PlacedLayer
        placed = PlacedModel(method, len(names), kind)
        for name, layer in zip(names, placed.layers, strict=True):
            layers[name].impl.placed = layer
        logger.info(
            "kvcomp: %r on %d of %d layers, pages of %d tokens",
            settings.method,
            len(names),
            len(layers),
            settings.page_size,
        )
    return set(names)
