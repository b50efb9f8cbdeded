"""Blocks that go back to the pool while their request runs: all but the first and the newest.

What leaves follows from the length alone, so the scheduler frees and the workers leave out the same
blocks without a word between them. In the workers the backend names the spec (`customize_spec`); in
the scheduler the spec names the manager.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvcomp.engines.vllm.settings import SinkWindow


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(FullAttentionSpec):
    """Full attention whose requests give blocks back.

    Attributes:
        sinks: first tokens that stay.
        window: newest tokens that stay.
    """

    sinks: int = 0
    window: int = 0

    @classmethod
    def of(cls, spec: FullAttentionSpec, method: SinkWindow) -> SinkWindowSpec:
        return replace_as(spec, cls, sinks=method.sinks, window=method.budget - method.sinks)

    @classmethod
    def merge(cls, specs: list[Any]) -> SinkWindowSpec:
        own = ("sinks", "window")
        base = FullAttentionSpec.merge([replace_as(x, FullAttentionSpec, drop=own) for x in specs])
        kept = {f.name: getattr(base, f.name) for f in fields(base) if f.init}
        return cls(**kept, sinks=specs[0].sinks, window=specs[0].window)


class SinkWindowManager(FullAttentionManager):
    """Frees the gap between sinks and window, once a request has been processed as far as ever.

    A prompt's blocks stay until all of it is in, and so do those of a request that was preempted
    and is processed anew: its pieces attend to everything before them.
    """

    REMEMBERED = 65536  # requests; the oldest are forgotten

    def __init__(self, kv_cache_spec: SinkWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._farthest: OrderedDict[str, int] = OrderedDict()  # request -> tokens ever processed

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        farthest = max(self._farthest.pop(request_id, 0), num_prompt_tokens or 0)
        self._farthest[request_id] = max(farthest, processed_computed_tokens)
        if len(self._farthest) > self.REMEMBERED:
            self._farthest.popitem(last=False)
        if processed_computed_tokens < farthest:
            return
        spec = self.kv_cache_spec
        first, last = gap(processed_computed_tokens, spec.sinks, spec.window, self.block_size)
        self._remove_blocks_in_range(request_id, first, last)


def gap(processed: int, sinks: int, window: int, block: int) -> tuple[int, int]:
    """[first, last) of the blocks that are free after `processed` tokens."""
    return cdiv(sinks, block), max(0, processed - window) // block


def kept_pages(
    table: Tensor, lens: Tensor, page: int, block: int, method: SinkWindow
) -> tuple[Tensor, Tensor]:
    """What a decode row attends to: page ids [B, 1, K] int32, and their tokens [B] int32.

    Args:
        table: [B, pages] int32.
        lens: [B] int32, the new token included, which has not been processed yet.
        page, block: tokens in a page of the table, and in a block of the engine's.
    """
    window = method.budget - method.sinks
    column = torch.arange(table.shape[1])
    sinks = cdiv(method.sinks, block) * block // page
    newest = (lens.long() - 1 - window).clamp(min=0) // block * block // page
    used = (lens.long() + page - 1) // page
    kept = (column < used[:, None]) & ((column < sinks) | (column >= newest[:, None]))
    count = kept.sum(1)
    order = kept.logical_not().int().argsort(dim=1, stable=True)[:, : int(count.max())]
    ids = torch.where(torch.arange(order.shape[1]) < count[:, None], table.gather(1, order), -1)
    return ids[:, None].contiguous(), (lens - (used - count) * page).int()


def register() -> None:
    """Make spec and manager known to this process."""
    # The registry fills itself with the built-in specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, FullAttentionSpec)
