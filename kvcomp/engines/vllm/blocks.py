"""Blocks that go back to vLLM's pool while their request runs.

What leaves follows from the length alone, so the scheduler frees and the workers leave out the same
blocks without a word between them. In the workers the backend names the spec (`customize_spec`); in
the scheduler the spec names the manager.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvcomp import LazyEviction
from kvcomp.engines.vllm.lazy import REMEMBERED, last_eviction
from kvcomp.engines.vllm.settings import SinkWindow


@dataclass(frozen=True, kw_only=True)
class LeavingSpec(FullAttentionSpec):
    """Full attention whose requests give blocks back.

    Attributes:
        method: says which tokens stay.
    """

    method: Any = None

    @classmethod
    def merge(cls, specs: list[Any]) -> LeavingSpec:
        base = FullAttentionSpec.merge(
            [replace_as(spec, FullAttentionSpec, drop=("method",)) for spec in specs]
        )
        kept = {f.name: getattr(base, f.name) for f in fields(base) if f.init}
        return cls(**kept, method=specs[0].method)


def leaving(spec: FullAttentionSpec, method: SinkWindow | LazyEviction) -> LeavingSpec:
    """The spec of a layer, with the method that lets its tokens go."""
    return replace_as(spec, LeavingSpec, method=method)


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        processed: tokens at the last look.
        farthest: tokens that were ever processed.
        whole: tokens that stay until all of them are in: the prompt, and what a request that was
            preempted processes anew, as its pieces attend to everything before them.
    """

    processed: int
    farthest: int
    whole: int

    def to(self, processed: int) -> Progress:
        # One more token was there than were processed, and the last step may not have been seen.
        whole = self.farthest + 2 if processed < self.processed else self.whole
        return Progress(processed, max(self.farthest, processed), max(self.whole, whole))


class LeavingManager(FullAttentionManager):
    """Frees the gap between the tokens that stay and the newest."""

    def __init__(self, kv_cache_spec: LeavingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._progress: OrderedDict[str, Progress] = OrderedDict()

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        prompt = num_prompt_tokens or 0
        last = self._progress.pop(request_id, Progress(0, 0, prompt))
        now = self._progress[request_id] = last.to(processed_computed_tokens)
        if len(self._progress) > REMEMBERED:
            self._progress.popitem(last=False)
        if now.processed < now.whole:
            return
        first, end = gap(self.kv_cache_spec.method, now.processed, now.whole, self.block_size)
        self._remove_blocks_in_range(request_id, first, end)


def gap(
    method: SinkWindow | LazyEviction, processed: int, whole: int, block: int
) -> tuple[int, int]:
    """[first, end) of the blocks that are free after `processed` tokens.

    Args:
        whole: tokens of the prompt.
        block: tokens in a block.
    """
    if isinstance(method, LazyEviction):
        return cdiv(method.budget, block), last_eviction(processed, whole, method) // block
    window = method.budget - method.sinks
    return cdiv(method.sinks, block), max(0, processed - window) // block


def register() -> None:
    """Make spec and manager known to this process."""
    # The registry fills itself with the built-in specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(LeavingSpec, LeavingManager, FullAttentionSpec)
