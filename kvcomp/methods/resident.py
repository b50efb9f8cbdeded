"""Settings of a retrieval method: what it has on the device, and the bytes that a step moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from kvcomp.methods.base import Method
from kvcomp.methods.cost import Place, StepBytes

if TYPE_CHECKING:
    from typing_extensions import Self


class Shares(TypedDict):
    """The fields of `Resident` that bound the number of tokens on the device."""

    budget: int
    sinks: int
    local: int
    segment: tuple[int, int]


@dataclass(frozen=True)
class Resident(Method):
    """Tokens in units, of which some are on the device beside the first and the newest tokens.

    Attributes:
        budget: B, tokens retrieved at once, per KV head; sinks and local tokens come on top.
        sinks: S, first tokens, always on the device.
        local: W, newest tokens on the device. If there are more, the oldest segment leaves when a
            row selects; with the open segment there are up to W + s_max.
        segment: (s_min, s_max), length of a segment of the output in tokens.
        dense_layers: number of first layers that keep everything on the device and attend to all.
        newest: W0, newest tokens of a prompt that stay local; at most W. None: W / 2.
        host_limit: limit in bytes of host memory for K and V of all layers; None: no limit.
        audit: measure at every step the share of attention that the resident tokens cover; this
            reads the whole pool.
    """

    budget: int = 1024  # B
    sinks: int = 16  # S
    local: int = 256  # W
    segment: tuple[int, int] = (4, 64)  # s_min, s_max
    dense_layers: int = 2
    newest: int | None = None  # W0
    host_limit: int | None = None
    audit: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.sinks >= 0, "sinks", "at least 0")
        self._require(self.local >= 1, "local", "at least 1 token")
        shortest, longest = self.segment
        self._require(1 <= shortest <= longest, "segment", "1 <= shortest <= longest")
        self._require(self.dense_layers >= 0, "dense_layers", "at least 0")
        self._require(
            0 <= self.num_newest <= self.local,
            "newest",
            f"0 to local={self.local} tokens",
        )
        self._require(
            self.budget >= self.sinks + self.local,
            "budget",
            f"at least sinks + local = {self.sinks + self.local} tokens",
        )
        self._require(
            self.host_limit is None or self.host_limit >= 0,
            "host_limit",
            "at least 0 bytes, or None",
        )

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens on the device, for short contexts."""
        return cls(**cls.shares(128 if budget is None else budget))

    @classmethod
    def shares(cls, total: int) -> Shares:
        """Fields with which at most `total` tokens are on the device at a step."""
        sinks, local = max(1, total // 32), max(1, total // 8)
        longest = max(1, min(16, total // 16))
        budget = total - sinks - local - longest - 1
        return {
            "budget": budget,
            "sinks": sinks,
            "local": local,
            "segment": (min(4, longest), longest),
        }

    @property
    def num_newest(self) -> int:
        """W0."""
        return self.local // 2 if self.newest is None else self.newest

    @property
    def most_resident(self) -> int:
        """The largest number of tokens of a row on the device, including the newest."""
        return self.sinks + self.budget + self.local + self.segment[1] + 1

    def step_bytes(self, at: Place) -> StepBytes:
        """An estimate that gives the output units of the prompt's size. A step pays its share of a
        selection, and every selection fetches all of its tokens."""
        retrieving = at.layers - self.dense_layers
        attended = min(at.seen, self.sinks + self.budget + self.local)
        resident = min(at.seen, self.most_resident)
        fetched = min(max(at.seen - self.sinks - self.local, 0), self.budget)
        width = self.digest(torch.zeros(1, at.head_dim)).shape[-1]
        digests = retrieving * at.seen / self.unit_size * at.kv_heads * width * at.itemsize
        whole = self.dense_layers * at.seen
        return StepBytes(
            read=(whole + retrieving * attended) * at.token_bytes,
            held=(whole + retrieving * resident) * at.token_bytes + digests,
            scoring=self.selection_rate * digests,
            link=self.selection_rate * retrieving * fetched * at.pool_bytes,
            host=retrieving * at.seen * at.pool_bytes,
        )

    @property
    def selection_rate(self) -> float:
        """Selections per step and layer, if known before decoding; else 1, the upper bound."""
        return 1.0

    @property
    def unit_size(self) -> int:
        """The mean number of tokens in a unit of the prompt."""
        raise NotImplementedError

    def digest(self, keys: Tensor) -> Tensor:
        """The digest of the tokens of one unit: keys [..., n, D] -> [..., W]."""
        return keys.mean(-2)

    def check(self, num_layers: int) -> None:
        self._require(
            self.dense_layers < num_layers,
            "dense_layers",
            f"fewer than the {num_layers} layers of this model",
        )
