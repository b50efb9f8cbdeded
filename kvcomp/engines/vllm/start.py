"""What a server cannot run stops it, in its first process, before anything is started.

vLLM shows a plugin no configuration. Its platform sees each one before the engine starts, so the
plugin puts its own question behind the platform's. Without it a server on another device, or on a
vLLM whose hooks kvcomp does not know, would ignore the key and serve with dense attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvcomp import Delta, Full
from kvcomp.engines.vllm.settings import WHERE, Settings
from kvcomp.ops import OPS

KIND = "full_attention"  # of layers, as vLLM calls them


def guard(
    platform: Any,
    obstacle: str | None,
    prepare: Callable[[Any, Settings], None] = lambda vllm_config, settings: None,
) -> None:
    """Refuse the configurations that ask for kvcomp and cannot have it; pass on all others.

    Args:
        platform: vLLM's; its `check_and_update_config(vllm_config)` is extended.
        obstacle: why no method can run here; None where one can. The extended hook raises it as a
            RuntimeError, and what `Settings.of`, `Settings.refuse` and `prepare` raise.
        prepare: what a configuration that can be run still needs on this device.
    """
    stock = platform.check_and_update_config

    @functools.wraps(stock)
    def check_and_update_config(vllm_config: Any) -> None:
        stock(vllm_config)
        settings = Settings.of(vllm_config)
        if settings is None:
            return
        if obstacle is not None:
            raise RuntimeError(obstacle)
        settings.refuse(vllm_config)
        prepare(vllm_config, settings)

    platform.check_and_update_config = check_and_update_config


def prepare_gpu(vllm_config: Any, settings: Settings) -> None:
    """Give the layers with full attention kvcomp's backend, which a GPU has under its own name.

    Raises:
        ValueError: a method or a page size that the backend for GPUs lacks, another backend that
            was asked for, a build of kvcomp without kernels for GPUs.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    method, size = settings.method, settings.page_size
    if not isinstance(method, Full | Delta):
        raise ValueError(f"{WHERE}: {method!r} runs on CPUs only; on GPUs: expected full or delta")
    if size % 16:
        raise ValueError(
            f"{WHERE}: page_size: expected a multiple of 16, as vLLM's kernel for prompts on GPUs"
            f" has no other pages, got {size}"
        )
    for name in "decode_attention", "attend_and_select":
        if OPS[name].bound["cuda"] == "reference":
            raise ValueError(
                f"{WHERE}: {name} has neither a CUDA nor a Triton kernel here:"
                f" {OPS[name].missing.get('cuda')}; {OPS[name].missing.get('triton')}"
            )
    kinds = vllm_config.attention_config.backend_per_kind
    given = kinds.setdefault(KIND, AttentionBackendEnum.CUSTOM)
    if given is not AttentionBackendEnum.CUSTOM:
        raise ValueError(
            f"{WHERE}: attention backend of {KIND} layers: expected CUSTOM, which is kvcomp's, got"
            f" {given.name}"
        )
