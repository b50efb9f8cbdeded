"""Prompts, or drafts, of different lengths in one row: no padding goes through the model.

The prompts lie one behind another in one row, with positions of their own. Each attends to itself
alone, and its K and V become a row of the cache. The layers of the model see as many tokens as
there are, where padding would make each prompt as long as the longest.

Source: Prepacking (arXiv 2404.09529). Departures: one row for all prompts, since each attends to
itself and no mask of the whole row is needed; and the last token of a prompt goes in too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor


class PackedDrafts:
    """Where the drafts of rows, `lengths` of each, lie in a row of all. A row may have none.

    Attributes:
        lens: [B] int32, their numbers.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._shape = len(lengths), max(lengths)
        step = torch.arange(max(lengths), device=device)
        first = (self.lens.cumsum(0) - self.lens)[:, None]
        # Behind a row's drafts stand others, which nobody will look at.
        self._places = (first + step).clamp(max=sum(lengths) - 1).flatten()
        self._back = (step < self.lens[:, None]).flatten().nonzero()[:, 0]

    def rows(self, packed: Tensor, dim: int) -> Tensor:
        """[1, ..., N, ...] -> [B, ..., most, ...]; `dim` is that of N."""
        rows = packed[0].movedim(dim - 1, 0).index_select(0, self._places)
        return rows.unflatten(0, self._shape).movedim(1, dim)

    def packed(self, rows: Tensor) -> Tensor:
        """[B, most, ...] -> [1, N, ...]."""
        return rows.flatten(0, 1).index_select(0, self._back)[None]


class Packing:
    """Where prompts of `lengths` tokens lie in a row of all of them.

    Attributes:
        valid: [B, longest] bool, the same prompts padded on the left.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.longest = list(lengths), max(lengths)
        self.spans = list(pairwise(accumulate(self.lengths, initial=0)))
        place = torch.arange(self.longest, device=device)
        missing = self.longest - torch.tensor(self.lengths, device=device)
        self.valid = place >= missing[:, None]

    def rows(self, packed: Tensor, dim: int) -> Tensor:
        """[1, ..., N, ...] -> [B, ..., longest, ...], zeros for padding; `dim` is that of N."""
        shape = list(packed.shape)
        shape[0], shape[dim] = len(self.lengths), self.longest
        rows = packed.new_zeros(shape)
        for row, (first, last) in enumerate(self.spans):
            count = last - first
            piece = packed[0].narrow(dim - 1, first, count)
            rows[row].narrow(dim - 1, self.longest - count, count).copy_(piece)
        return rows

    def attend(
        self,
        inner: Callable,
        module: torch.nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **given: Any,
    ) -> Tensor:
        """Causal attention of each prompt to itself, by the user's implementation: q, k, v
        [1, H, N, D] and a causal mask of all, or None -> [1, N, Hq, D]."""
        places, outs = given.pop("position_ids", None), []
        for first, last in self.spans:
            own = {} if places is None else {"position_ids": places[..., first:last]}
            part = None if mask is None else mask[..., first:last, first:last]
            tensors = (x[:, :, first:last] for x in (q, k, v))
            outs.append(inner(module, *tensors, part, **given, **own)[0])
        return torch.cat(outs, 1)
