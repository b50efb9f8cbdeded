"""LagKV: scores from the tokens that follow, without attention (arXiv 2504.04704).

The text is cut into partitions. The keys and values of a partition are normalised per channel by
the minimum and maximum of the next partition, the "lag". Tokens that vary most over their channels
rank highest within their partition, and this rank is the score. Deviations: eviction keeps a budget
instead of a ratio of each partition; the last two partitions have no score yet and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods import alike
from kvcomp.methods.eviction import EXAMPLE_BUDGET, EXAMPLE_WINDOW, Eviction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LagKV(Eviction, name="lagkv", baseline=True):
    """The score of a token is the rank of its spread within its partition.

    An eviction reads the lengths from the device.

    Attributes:
        partition: L, tokens in a partition.
        sinks: number of first tokens, which stay.
    """

    window: int = 128
    partition: int = 128
    sinks: int = 4

    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.partition >= 1, "partition", "at least 1 token")
        self._require(self.sinks >= 0, "sinks", "at least 0 tokens")
        least = self.sinks + self.num_recent
        expected = f"at least sinks + 2 * partition - 1 = {least}"
        self._require(self.budget >= least, "budget", expected)

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens at any time, with partitions of an eighth of that."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        window = min(EXAMPLE_WINDOW, budget // 4)
        partition = max(budget // 8, 2)
        return cls(budget=budget - window, window=window, partition=partition, sinks=1)

    @property
    def num_recent(self) -> int:
        return 2 * self.partition - 1  # as many may be without a score

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        if "rank" not in layer.slots:
            layer.track("rank", self.num_units(layer), torch.float32)
            layer.state["ranked"] = torch.zeros_like(layer.seq_lens)  # partitions

    def score(self, layer: LayerCache) -> Tensor:
        """[B, U, max_len]; tokens without a rank get the best score."""
        positions, rank = layer.positions(self.num_units(layer)), layer.slots["rank"]
        for row, seen in enumerate(layer.logical_lens.tolist()):
            order = positions[row, :, : int(layer.seq_lens[row])].argsort(-1)  # [U, tokens]
            complete = max(seen - self.sinks, 0) // self.partition
            for part in range(int(layer.state["ranked"][row]), complete - 1):
                # Nothing without a rank has left, so the newest tokens are all there, in order.
                begin = order.shape[1] - (seen - self.sinks - part * self.partition)
                slots, lag = order[:, begin : begin + 2 * self.partition].split(self.partition, 1)
                rank[row].scatter_(1, slots, self.ranks(layer, row, slots, lag))
            layer.state["ranked"][row] = max(complete - 1, 0)
        ranked = self.sinks + layer.state["ranked"] * self.partition
        scored = (positions >= self.sinks) & (positions < ranked[:, None, None])
        return rank[..., : layer.max_len].masked_fill(~scored, torch.inf)

    def ranks(self, layer: LayerCache, row: int, slots: Tensor, lag: Tensor) -> Tensor:
        """Ranks in (0, 1] of the tokens of one partition: slots, lag [U, L] -> [U, L]."""
        total = torch.zeros(slots.shape, device=slots.device)
        for stored in (layer.keys[row], layer.values[row]):  # [H, m, D]
            x, reference = (_take(stored, index) for index in (slots, lag))
            low, high = reference.amin(1, keepdim=True), reference.amax(1, keepdim=True)
            spread = _deviation((x - low) / (high - low).clamp(min=1e-6))  # [H, L]
            heads = alike.softmax(spread).unflatten(0, (len(slots), -1))
            total += alike.total(heads, 1) / heads.shape[1]
        return (total.argsort(dim=-1, stable=True).argsort(-1) + 1) / self.partition


def _deviation(x: Tensor) -> Tensor:
    """The standard deviation of each row of a sample."""
    count = x.shape[-1]
    apart = x - alike.total(x, -1)[..., None] / count
    return (alike.total(apart.square(), -1) / (count - 1)).sqrt()


def _take(stored: Tensor, slots: Tensor) -> Tensor:
    """Rows of [H, m, D] at slots [U, L], where a unit's heads share its slots: [H, L, D] fp32."""
    index = slots.repeat_interleave(len(stored) // len(slots), 0)
    return stored.gather(1, index[..., None].expand(-1, -1, stored.shape[-1])).float()
