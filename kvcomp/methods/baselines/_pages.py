"""Retrieval in pages: prompt and output are cut into runs of tokens of the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.retrieval import Retrieval

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PagedRetrieval(Retrieval):
    """Selects pages at every step by an upper bound on the logits of their keys.

    The digest of a page consists of two vectors, and `turned` builds two vectors from a query, so
    that their inner product is the bound. Pages then compete in the same way as the units of other
    methods. The digest here is Quest's: the maximum and the minimum of each channel. Subclasses
    may override it.

    Attributes:
        page_size: tokens in a page; segments of the output are pages too.
    """

    page_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.page_size >= 1, "page_size", "at least 1 token")
        object.__setattr__(self, "segment", (self.page_size, self.page_size))

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens on the device, pages of 4, for short contexts and few layers."""
        fields = cls.shares(128 if budget is None else budget)
        longest = fields["segment"][1]
        page = min(4, longest)
        fields["budget"] += longest - page
        return cls(**fields, page_size=page, dense_layers=1)

    @property
    def unit_size(self) -> int:
        return self.page_size

    def unit_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def units(self, keys: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, tokens, _ = keys.shape
        count, size = self.unit_count(tokens), self.page_size
        slot = torch.arange(tokens, device=keys.device)
        labels = ((slot - first[:, None]) // size)[:, None].expand(-1, heads, -1).int()
        page = torch.arange(count, device=keys.device) * size
        sizes = (last[:, None] - first[:, None] - page).clamp(0, size).int()
        digests = keys.new_zeros(batch, heads, count, self.digest(keys[:1, :1, :1]).shape[-1])
        for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            whole = (end - begin) // size
            pages = keys[row, :, begin : begin + whole * size].unflatten(1, (whole, size))
            digests[row, :, :whole] = self.digest(pages)
            if begin + whole * size < end:
                digests[row, :, whole] = self.digest(keys[row, :, begin + whole * size : end])
        return labels, digests, sizes[:, None].expand(-1, heads, -1)

    def digest(self, keys: Tensor) -> Tensor:
        """The largest and the smallest value of each channel: keys [..., n, D] -> [..., 2 D]."""
        return torch.cat([keys.amax(-2), keys.amin(-2)], -1)

    def turned(self, q: Tensor) -> Tensor:
        """q [B, Hq, D] -> [B, Hq, 2 D], whose inner product with a digest is the bound."""
        return torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)

    def store(self, layer: LayerCache, closed: Tensor) -> None:
        index = layer.hosted.index
        unused = index.digests.new_empty(*index.digests.shape[:3], layer.head_dim)
        layer.hosted.store(layer, closed, unused)  # the mean is not this digest
        for row in closed.nonzero().flatten().tolist():
            unit = int(index.num_units[row]) - 1
            begin, end = index.starts[row, 0, unit : unit + 2].tolist()
            keys, _ = layer.decoded(layer.hosted.pool.read(row, begin, end))
            index.digests[row, :, unit] = self.digest(keys)

    def scores(self, layer: LayerCache, q: Tensor, scale: float, active: Tensor) -> Tensor:
        return super().scores(layer, self.turned(q), scale, active)
