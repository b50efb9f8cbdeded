"""One decode step over an engine's block table: what each layer attends to.

Nothing here knows vLLM. An engine places each layer once, opens a `Step` for every batch of decode
rows, and calls `attend` layer by layer, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kvcomp import Delta, ops
from kvcomp.engines.vllm.settings import EngineMethod


@dataclass
class Selection:
    """What the latest selecting layer chose, shared by all layers of a model.

    Columns of the block table, and not page ids: layers may lie in groups with tables of their own.

    Attributes:
        columns: [B, K] int32, ascending, then -1.
        lens: [B] int32, tokens in these pages.
    """

    columns: Tensor | None = None
    lens: Tensor | None = None


@dataclass
class Step:
    """A batch of decode rows in one group of layers.

    Attributes:
        table: [B, pages] int32, page ids in order; anything behind a row's last page.
        lens: [B] int32, tokens of each row, the newest included.
        longest: the largest of them, known on the host.
        page_size: tokens in a page.
        logits: [B, Hq, pages * page_size] fp32, for layers that select.
        kept: page ids [B, 1, K] and lengths [B], where every layer attends to the same part of
            the table; None: to all of it.
    """

    table: Tensor
    lens: Tensor
    longest: int
    page_size: int
    logits: Tensor | None = None
    kept: tuple[Tensor, Tensor] | None = None
    _chosen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def pages_of(self, selection: Selection) -> Tensor:
        """[B, 1, K] int32: the selected columns as page ids of this table."""
        columns = selection.columns
        assert columns is not None, "no layer below has selected"
        if self._chosen is None or self._chosen[0] is not columns:
            ids = self.table.gather(1, columns.clamp(min=0).long())
            self._chosen = columns, torch.where(columns < 0, -1, ids)[:, None]
        return self._chosen[1]


@dataclass(frozen=True)
class PlacedLayer:
    """A layer's part in the method.

    Attributes:
        method: with the group of ranks that hold the other heads, where there are any.
        dense: whether it attends to everything.
        selects: whether it chooses the pages for the layers above it.
        selection: that of the model.
    """

    method: EngineMethod
    dense: bool
    selects: bool
    selection: Selection

    @classmethod
    def of(
        cls, method: EngineMethod, position: int, layers: int, selection: Selection
    ) -> PlacedLayer:
        """Layer `position` of the `layers` that the method runs.

        Raises:
            ValueError: the method does not fit a model of so many layers.
        """
        method.check(layers)
        if not isinstance(method, Delta):
            return cls(method, True, False, selection)
        dense, planners = method.roles(layers)
        return cls(method, position in dense, position in planners, selection)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float) -> Tensor:
        """q [B, Hq, D] over the pages of k, v [B, Hkv, T, D]; out [B, Hq, D]."""
        size, lens, method = step.page_size, step.lens, self.method
        table = step.table[:, None]
        read = partial(ops.decode_attention, q, k, v, page_size=size, scale=scale)
        if step.kept is not None:
            ids, kept = step.kept
            return read(kept, page_ids=ids)[0]
        if not isinstance(method, Delta) or step.longest <= method.budget:
            return read(lens, page_ids=table)[0]
        if not self.dense:
            ids, chosen = step.pages_of(self.selection), self.selection.lens
            assert chosen is not None, "a selecting layer comes before the sparse ones"
            return read(chosen, page_ids=ids)[0]
        if not self.selects:
            return read(lens, page_ids=table)[0]
        logits = step.logits
        assert logits is not None, "a step longer than the budget has room for them"
        if method.group is None:
            out, _, _, columns, kept = ops.attend_and_select(
                q,
                k,
                v,
                lens,
                size,
                method.num_pages,
                logits=logits,
                page_ids=table,
                scale=scale,
                num_recent=method.recent,
            )
        else:  # the max over the heads of all ranks, as `Delta.score` has it
            out, lse = read(lens, page_ids=table, logits=logits)
            scores = method.score(logits, lse, lens)
            columns, kept = ops.select_pages(
                scores, lens, size, method.num_pages, num_recent=method.recent
            )
        self.selection.columns, self.selection.lens = columns[:, 0], kept
        return out
