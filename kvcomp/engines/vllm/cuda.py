"""The backend for NVIDIA GPUs: decode rows by kvcomp, prompts by vLLM's Triton kernel.

It has been run on CPU tensors only, never on a GPU. vLLM knows it as CUSTOM, for layers with full
attention (start.py says so). Both kernels read vLLM's cache as vLLM writes it.

Shapes and addresses are the same in every step, as CUDA graphs need: the block table is read in its
whole width, the logits of layers that select have a buffer for the largest batch of the longest
requests, and the host decides nothing by lengths but by vLLM's bound for them. In a captured graph
that bound is the longest request there can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvcomp import Delta
from kvcomp.engines.vllm.managed import ManagedLayer
from kvcomp.engines.vllm.placing import asked, check_others, page_sizes, place_layers
from kvcomp.engines.vllm.settings import Settings
from kvcomp.engines.vllm.step import Step
from kvcomp.ops.decode_attention import logits_dtype


class KvcompBackend(TritonAttentionBackend):
    """vLLM's Triton backend, but for decode steps of the layers that a method runs."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        stock = TritonAttentionBackend.get_supported_kernel_block_sizes
        return page_sizes(kv_cache_spec) or stock(kv_cache_spec)

    @staticmethod
    def get_impl_cls() -> type[KvcompImpl]:
        if asked() is None:
            raise ValueError(
                "kvcomp.engines.vllm: attention backend CUSTOM: expected a method in the"
                f" {Settings.KEY!r} key of the additional configuration, got none"
            )
        return KvcompImpl

    @staticmethod
    def get_builder_cls() -> type[KvcompBuilder]:
        return KvcompBuilder


@dataclass
class KvcompMetadata(TritonAttentionMetadata):
    """Of one batch, for one group of layers. As a whole it is for layers that stay with vLLM.

    Attributes:
        num_decodes: first rows, with one token each.
        step: what these rows are decoded over; None without any.
        prompts: vLLM's metadata of the other rows; None without any.
    """

    num_decodes: int = 0
    step: Step | None = None
    prompts: TritonAttentionMetadata | None = None


class KvcompBuilder(TritonAttentionMetadataBuilder):
    """Cuts a batch into decode rows, which come first, and prompts.

    A piece of a prompt that has one token is a decode row: where all rows have one, vLLM replays
    the graph of a decode step.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    supports_draft_decode_metadata_update = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        self._init_reorder_batch_threshold(1)
        settings = Settings.of(vllm_config)
        assert settings is not None
        self.method = settings.method
        self.managed = place_layers(vllm_config, settings, device) & set(layer_names)
        check_others(set(layer_names) - self.managed, kv_cache_spec, self.block_size)
        self.logits: Tensor | None = None
        if self.managed and isinstance(self.method, Delta):
            batch = vllm_config.scheduler_config.max_num_seqs
            pages = -(-vllm_config.model_config.max_model_len // self.block_size)
            self.logits = torch.empty(
                (batch, self.num_heads_q, pages * self.block_size),
                dtype=logits_dtype(torch.empty(0, dtype=kv_cache_spec.dtype, device=device)),
                device=device,
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self.managed:
            return stock
        metadata = KvcompMetadata(**vars(stock))
        decodes, prompts, first, _ = split_decodes_and_prefills(common_attn_metadata)
        metadata.num_decodes = decodes
        if decodes:
            metadata.step = self._step(common_attn_metadata, decodes)
        if prompts:
            rows = behind(common_attn_metadata, decodes, first)
            metadata.prompts = super().build(0, rows, fast_build)
        return metadata

    def _step(self, batch: CommonAttentionMetadata, decodes: int) -> Step:
        size, table = self.block_size, batch.block_table_tensor[:decodes]
        logits = self.logits
        if logits is not None:
            # vLLM rounds the width of its table up; nothing lies there.
            table = table[:, : logits.shape[-1] // size]
            logits = logits[:decodes, :, : table.shape[1] * size]
        return Step(
            table=table,
            lens=batch.seq_lens[:decodes],
            longest=min(batch.max_seq_len, table.shape[1] * size),
            page_size=size,
            logits=logits,
        )


class KvcompImpl(ManagedLayer, TritonAttentionImpl):
    """One attention layer."""

    no_window = (-1, -1)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return not self.managed and super().fused_output_quant_supported(quant_key)

    def knows(self, metadata: Any) -> bool:
        return isinstance(metadata, KvcompMetadata)

    def keys_and_values(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Of any strides."""
        k, v = kv_cache.split(self.head_size, dim=-1)
        return k, v

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
        count, prompts = metadata.num_decodes, metadata.prompts
        rest = query[count:], key[count:], value[count:], kv_cache, prompts, output[count:]
        TritonAttentionImpl.forward(self, layer, *rest)


def behind(batch: CommonAttentionMetadata, row: int, token: int) -> CommonAttentionMetadata:
    """The rows of a batch from `row` on, whose queries begin at `token`."""
    rows = slice(row, batch.num_reqs)
    bound = batch.seq_lens_cpu_upper_bound
    prefilling = batch.is_prefilling
    return batch.replace(
        query_start_loc=batch.query_start_loc[row : batch.num_reqs + 1] - token,
        query_start_loc_cpu=batch.query_start_loc_cpu[row : batch.num_reqs + 1] - token,
        seq_lens=batch.seq_lens[rows],
        num_reqs=batch.num_reqs - row,
        num_actual_tokens=batch.num_actual_tokens - token,
        block_table_tensor=batch.block_table_tensor[rows],
        slot_mapping=batch.slot_mapping[token:],
        is_prefilling=None if prefilling is None else prefilling[rows],
        seq_lens_cpu_upper_bound=None if bound is None else bound[rows],
        positions=None if batch.positions is None else batch.positions[token:],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
