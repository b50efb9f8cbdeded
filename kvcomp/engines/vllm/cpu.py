"""The backend for CPUs: decode rows by kvcomp, everything else by vLLM's own.

vLLM has no choice of backends on a CPU, so `register` puts this one in the place of the built-in.
kvcomp writes the pages of managed layers (placing.py) and decodes over them. All others stay as
they are, and so does everything where the server was not asked for a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
from kvcomp.engines.vllm.blocks import leaving
from kvcomp.engines.vllm.lazy import LazyStep, Requests
from kvcomp.engines.vllm.managed import ManagedLayer
from kvcomp.engines.vllm.placing import asked, check_others, page_sizes, place_layers
from kvcomp.engines.vllm.prompts import Lost, PromptPlanner, Prompts
from kvcomp.engines.vllm.settings import Settings, SinkWindow
from kvcomp.engines.vllm.sink_window import kept_pages
from kvcomp.engines.vllm.step import Step


class KvcompCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend, but for the layers that a method runs."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        stock = CPUAttentionBackend.get_supported_kernel_block_sizes
        return page_sizes(kv_cache_spec) or stock(kv_cache_spec)

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
        self.managed = place_layers(vllm_config, settings) & set(layer_names)
        check_others(set(layer_names) - self.managed, kv_cache_spec, self.block_size)
        self.engine_block = vllm_config.cache_config.block_size
        self.planner = PromptPlanner(self.num_heads, self.num_kv_heads, self.head_dim, self.dtype)
        self.logits: Tensor | None = None
        method = self.method
        self.requests = Requests(method) if isinstance(method, LazyEviction) else None

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
            lost = None if self.requests is None else self._lost(metadata, decodes, self.requests)
            metadata.prompts = self.planner.plan(
                metadata, decodes, decode_tokens, prompt_tokens, self.block_size, lost
            )
        return metadata

    @staticmethod
    def _lost(metadata: KvcompMetadata, first_row: int, requests: Requests) -> Lost | None:
        """What the pieces of prompts from a row on cannot attend to any more."""
        lens = metadata.seq_lens[first_row:]
        before = lens - metadata.query_start_loc[first_row:].diff()
        cuts = requests.note(metadata.block_table[first_row:, 0], before, lens)
        budget = requests.method.budget
        return Lost(budget, (cuts - budget).clamp(min=0)) if cuts.any() else None

    def _step(self, metadata: KvcompMetadata, count: int) -> Step:
        size, lens = self.block_size, metadata.seq_lens[:count]
        longest = int(lens.max())
        table = metadata.block_table[:count, : -(-longest // size)]
        if isinstance(self.method, LazyEviction):
            assert self.requests is not None
            known = self.requests.of(table[:, 0], lens)
            logits = self._logits_for(count, table.shape[1] * size)
            return LazyStep.plan(self.method, table, lens, known, size, logits)
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


class KvcompImpl(ManagedLayer, CPUAttentionBackendImpl):
    """One attention layer."""

    no_window = -1

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if not self.managed:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            pages.write(kv_cache, key, value, slot_mapping[: len(key)])

    def keys_and_values(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return pages.keys_and_values(kv_cache)

    def attend_to_prompts(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
    ) -> None:
        metadata.prompts.attend(query, kv_cache, output, self.scale)
