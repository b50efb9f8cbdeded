"""Prompts, and pieces of prompts, through vLLM's own kernel.

It reads a cache in its own order, so the tokens of these rows are gathered into a scratch cache,
once per layer and batch. Results are those of a stock server, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvcomp.engines.vllm.pages import rows

BLOCK = 128  # tokens in a block of the scratch cache


@dataclass
class Prompts:
    """The rows of a batch that bring more than one token, or a first one.

    Attributes:
        tokens: where their queries are in the batch.
        sources: [N] int64, places of their tokens in the layer's pages.
        slots: [N] int64, the same tokens in the scratch cache.
        table: [rows, blocks] int32, of the scratch cache.
        scratch: [blocks, Hkv, 2 * BLOCK, D], K and then V of each block.
    """

    tokens: slice
    query_start_loc: Tensor
    seq_lens: Tensor
    sources: Tensor
    slots: Tensor
    table: Tensor
    schedule: Tensor
    scratch: Tensor
    isa: str

    def attend(self, query: Tensor, cache: Tensor, output: Tensor, scale: float) -> None:
        """query, output [tokens of the batch, Hq, D]: fill in those of these rows."""
        size = query.shape[-1]
        new = rows(cache)[self.sources]
        keys, values = self.scratch.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            new[..., :size], new[..., size:], keys, values, self.slots, self.isa
        )
        vllm_ops.cpu_attention_with_kv_cache(
            query=query[self.tokens],
            key_cache=keys,
            value_cache=values,
            output=output[self.tokens],
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0,
            scheduler_metadata=self.schedule,
            s_aux=None,
        )


@dataclass
class Lost:
    """Tokens that are gone of requests that have pieces of their prompts in a batch.

    Attributes:
        first: tokens in front of those that are lost.
        count: [rows] int64, how many are; 0: all tokens are there.
    """

    first: int
    count: Tensor


class PromptPlanner:
    """Makes a `Prompts` of the last rows of a batch; its scratch cache grows with them."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype):
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.dtype = head_size, dtype
        self.isa = _get_attn_isa(dtype, BLOCK, head_size)
        self.scratch: Tensor | None = None

    def plan(
        self,
        metadata: Any,
        first_row: int,
        first_token: int,
        num_tokens: int,
        page_size: int,
        lost: Lost | None = None,
    ) -> Prompts:
        """For rows from `first_row` on, whose queries begin at `first_token`.

        Args:
            metadata: vLLM's of the batch: seq_lens, block_table, query_start_loc.
            lost: tokens that are left out.
        """
        lens = metadata.seq_lens[first_row:].long()
        if lost is not None:
            lens = lens - lost.count
        blocks = (lens + BLOCK - 1) // BLOCK
        starts = blocks.cumsum(0) - blocks
        row = torch.repeat_interleave(torch.arange(len(lens)), lens)
        place = torch.arange(int(lens.sum())) - (lens.cumsum(0) - lens)[row]
        token = place
        if lost is not None:
            token = place + lost.count[row] * (place >= lost.first)
        table = metadata.block_table[first_row:]
        sources = table[row, token // page_size].long() * page_size + token % page_size
        total, widest = int(blocks.sum()), int(blocks.max())
        if self.scratch is None or len(self.scratch) < total:
            self.scratch = torch.zeros(
                (total, self.num_kv_heads, 2 * BLOCK, self.head_size), dtype=self.dtype
            )
        seq_lens = lens.int()
        query_start_loc = (metadata.query_start_loc[first_row:] - first_token).contiguous()
        schedule = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        return Prompts(
            tokens=slice(first_token, first_token + num_tokens),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            sources=sources,
            slots=starts[row] * BLOCK + place,
            table=(starts[:, None] + torch.arange(widest)).clamp(max=total - 1).int(),
            schedule=schedule,
            scratch=self.scratch[:total],
            isa=self.isa,
        )
