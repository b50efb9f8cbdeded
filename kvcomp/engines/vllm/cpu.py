"""The backend for CPUs: decode rows by kvcomp, everything else by vLLM's own.

vLLM has no choice of backends on a CPU, so `register` puts this one in the place of the built-in.
Layers with full attention and nothing besides are *managed*: kvcomp writes their pages and decodes
over them. Layers with a window, chunks, sinks, a soft cap, ALiBi or an 8-bit cache stay as they
are, and so does everything where the server was not asked for a method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcomp import Delta, LazyEviction
from kvcomp.engines.vllm import pages
from kvcomp.engines.vllm.blocks import LeavingSpec, leaving
from kvcomp.engines.vllm.lazy import LazyLayer, LazyStep, PromptLengths
from kvcomp.engines.vllm.prompts import PromptPlanner, Prompts
from kvcomp.engines.vllm.settings import Settings, SinkWindow
from kvcomp.engines.vllm.sink_window import kept_pages
from kvcomp.engines.vllm.step import PlacedLayer, PlacedModel, Step
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


class KvcompCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend, but for the layers that a method runs."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        settings = asked()
        if settings is None or not (
            kv_cache_spec is None or isinstance(kv_cache_spec, FullAttentionSpec)
        ):
            return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
        # A number, not a multiple: vLLM then gives block tables that count pages of that size.
        return [settings.page_size]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        settings = asked()
        if settings is None or not settings.frees or type(spec) is not FullAttentionSpec:
            return spec
        assert isinstance(settings.method, SinkWindow | LazyEviction)
        return leaving(spec, settings.method)

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUAttentionBackendImpl if asked() is None else KvcompImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUAttentionMetadataBuilder if asked() is None else KvcompBuilder


@dataclass
class KvcompMetadata(CPUAttentionMetadata):
    """Of one batch, for one group of layers.

    Attributes:
        num_decodes: first rows, with one token each.
        step: what these rows are decoded over; None without any.
        prompts: the other rows; None without any.
    """

    num_decodes: int = 0
    step: Step | None = None
    prompts: Prompts | None = None


class KvcompBuilder(CPUAttentionMetadataBuilder):
    """Cuts a batch into decode rows, which come first, and prompts."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        settings = Settings.of(vllm_config)
        assert settings is not None
        self.method = settings.method
        self.managed = _place_layers(vllm_config, settings) & set(layer_names)
        _check_others(set(layer_names) - self.managed, kv_cache_spec, self.block_size)
        self.engine_block = vllm_config.cache_config.block_size
        self.planner = PromptPlanner(self.num_heads, self.num_kv_heads, self.head_dim, self.dtype)
        self.logits: Tensor | None = None
        self.prompts = PromptLengths()

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self.managed:
            return stock
        metadata = KvcompMetadata(**vars(stock))
        decodes, prompts, decode_tokens, prompt_tokens = split_decodes_and_prefills(
            common_attn_metadata, decode_threshold=1, treat_short_extends_as_decodes=False
        )
        metadata.num_decodes = decodes
        if decodes:
            metadata.step = self._step(metadata, decodes)
        if prompts:
            self.prompts.note(metadata.block_table[decodes:, 0], metadata.seq_lens[decodes:])
            metadata.prompts = self.planner.plan(
                metadata, decodes, decode_tokens, prompt_tokens, self.block_size
            )
        return metadata

    def _step(self, metadata: KvcompMetadata, count: int) -> Step:
        size, lens = self.block_size, metadata.seq_lens[:count]
        longest = int(lens.max())
        table = metadata.block_table[:count, : -(-longest // size)]
        if isinstance(self.method, LazyEviction):
            prompts = self.prompts.of(table[:, 0], lens)
            logits = self._logits_for(count, table.shape[1] * size)
            return LazyStep.plan(self.method, table, lens, prompts, size, logits)
        step = Step(table=table, lens=lens, longest=longest, page_size=size)
        if isinstance(self.method, SinkWindow):
            step.kept = kept_pages(table, lens, size, self.engine_block, self.method)
        elif isinstance(self.method, Delta) and longest > self.method.budget:
            step.logits = self._logits_for(count, table.shape[1] * size)
        return step

    def _logits_for(self, batch: int, positions: int) -> Tensor:
        """[batch, Hq, positions] fp32, of memory that is kept from step to step."""
        needed = batch * self.num_heads * positions
        if self.logits is None or self.logits.numel() < needed:
            self.logits = torch.empty(needed + needed // 2)
        return self.logits[:needed].view(batch, self.num_heads, positions)


class KvcompImpl(CPUAttentionBackendImpl):
    """One attention layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.managed = (
            self.attn_type == AttentionType.DECODER
            and self.sliding_window == -1
            and self.alibi_slopes is None
            and not self.logits_soft_cap
            and self.sinks is None
            and not self.is_fp8_kv_cache
            and self.kv_sharing_target_layer_name is None
            and self.head_size in HEAD_SIZES
        )
        self.placed: PlacedLayer | None = None  # by the builder, when all layers are known

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if not self.managed:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            pages.write(kv_cache, key, value, slot_mapping[: len(key)])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [tokens, Hq, D]; kv_cache [pages, Hkv, P, 2 * D]."""
        if not self.managed or attn_metadata is None:  # without metadata: a warm-up
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        count, step = attn_metadata.num_decodes, attn_metadata.step
        if step is not None:
            k, v = pages.keys_and_values(kv_cache)
            assert self.placed is not None, "the builder places all layers before the first step"
            self.placed.decode(query[:count], k, v, step, self.scale, output[:count])
        if attn_metadata.prompts is not None:
            attn_metadata.prompts.attend(query, kv_cache, output, self.scale)
        return output


def _check_others(others: set[str], spec: Any, page_size: int) -> None:
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


def _place_layers(vllm_config: Any, settings: Settings) -> set[str]:
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

            method = replace(method, group=get_tp_group().cpu_group)
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
