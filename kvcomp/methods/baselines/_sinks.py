"""Eviction that keeps the first tokens and the newest ones, as StreamingLLM and LM-Infinite do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import EXAMPLE_BUDGET, Eviction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SinkEviction(Eviction):
    """The score of a token is its position, and infinity for the first tokens, which can be moved.

    Attributes:
        sinks: number of first tokens, which stay.
    """

    unit: str = "layer"
    sinks: int = 4

    moves_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.budget - 1
        self._require(0 <= self.sinks <= most, "sinks", f"0 to budget - 1 = {most}")
        expected = "False, as only the sinks of a prompt can be moved"
        self._require(not self.keep_prompt, "keep_prompt", expected)

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """Evicts at every step; the first tokens take at most a quarter of the budget."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        return cls(budget=budget - 1, sinks=min(cls.sinks, budget // 4))

    @property
    def num_recent(self) -> int:
        return 1

    def start(self, cache: KVCache) -> None:
        super().start(cache)
        cache.require_rotation()

    def score(self, layer: LayerCache) -> Tensor:
        positions = layer.positions(self.num_units(layer))
        return positions.float().masked_fill(positions < self.sinks, torch.inf)

    def move_sinks(self, layer: LayerCache, shift: Tensor) -> None:
        """Rotate the first tokens as if they stood `shift` [B, sinks] >= 0 positions later.

        They are in the first slots. Each call rotates an original copy of their keys, so rounding
        errors do not add up.
        """
        if not self.sinks:
            return
        keys, state = layer.decoded(layer.stored(self.sinks))[0], layer.state
        if "sinks" in state:
            moved = (state["sink_shift"] > 0)[:, None, :, None]
            state["sinks"] = torch.where(moved, state["sinks"], keys)
        else:
            state["sinks"] = keys.clone()
        state["sink_shift"] = shift
        inv_freq = layer.cache.require_rotation().to(shift.device)
        single = state["sinks"].transpose(1, 2).flatten(0, 1)[:, :, None].clone()
        ops.rotate_keys(single, shift.flatten(), inv_freq)
        layer.replace_keys(single[:, :, 0].unflatten(0, shift.shape).transpose(1, 2))
