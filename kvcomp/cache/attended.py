"""Attended: how a decode step attends to a layer.

All of it goes through here: the methods' choices, the model's learned sinks, and layers of the
model that have no K and V of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.later import later
from kvcomp.cache.rows import Rows
from kvcomp.cache.slab import Slab

if TYPE_CHECKING:
    from kvcomp.cache.kv_cache import KVCache


class Attended(Slab):
    """The part of a layer that attends."""

    is_shared: bool
    _tokens: dict[str, Any] = later("a decode step")  # of the latest step, where shared

    if TYPE_CHECKING:
        position: int
        seq_lens: Tensor
        sinks: Tensor | None
        softcap: float | None

        @property
        def cache(self) -> KVCache: ...

    def attend(
        self,
        q: Tensor,
        scale: float,
        *,
        page_ids: Tensor | None = None,
        page_size: int = 1,
        seq_lens: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`decode_attention` over this layer, counted. Methods call the kernel only through this.

        Returns:
            out [B, Hq, D] and lse [B, Hq], sinks included.
        """
        lens = self.seq_lens if seq_lens is None else seq_lens
        if self.is_shared:
            self._tokens = {"lens": lens, "page_ids": page_ids, "page_size": page_size}
        return self.attend_over(
            q,
            scale,
            self.stored(),
            lens,
            page_ids=page_ids,
            page_size=page_size,
            logits=logits,
        )

    def attend_and_select(self, q: Tensor, scale: float, **selection: Any) -> tuple[Tensor, ...]:
        """`attend_and_select` over this layer, counted, for layers without `sinks`. `selection` is
        passed on.

        Returns:
            out [B, Hq, D], lse [B, Hq], scores, selected_ids and selected_lens.
        """
        self.cache.meter.attended(self.position, self.seq_lens)
        if self.is_shared:
            self._tokens = {"lens": self.seq_lens}
        k, v, words = self.stored()
        q = self.query(q)
        return ops.attend_and_select(
            q, k, v, self.seq_lens, scale=scale, words=words, softcap=self.softcap, **selection
        )

    def attend_over(
        self,
        q: Tensor,
        scale: float,
        rows: Rows,
        lens: Tensor,
        *,
        page_ids: Tensor | None = None,
        page_size: int = 1,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`decode_attention` over a part of this layer, counted; out [B, Hq, D], lse [B, Hq]."""
        self.cache.meter.attended(self.position, lens)
        return self._over(
            q, scale, rows, lens, page_ids=page_ids, page_size=page_size, logits=logits
        )

    def attend_again(self, q: Tensor, scale: float) -> Tensor:
        """Attention of another layer, which has no K and V of its own, to the tokens that this one
        has attended to in the same step. The meter counts them once.

        Returns:
            out [B, Hq, D].
        """
        return self._over(q, scale, self.stored(), **self._tokens)[0]

    def _over(
        self,
        q: Tensor,
        scale: float,
        rows: Rows,
        lens: Tensor,
        *,
        page_ids: Tensor | None = None,
        page_size: int = 1,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = ops.decode_attention(
            self.query(q),
            rows.k,
            rows.v,
            lens,
            page_ids=page_ids,
            page_size=page_size,
            scale=scale,
            logits=logits,
            words=rows.words,
            softcap=self.softcap,
        )
        if self.sinks is None:
            return out, lse
        sinks = self.sinks.detach().float().expand_as(lse).contiguous()
        return ops.merge_states(out, lse, torch.zeros_like(out), sinks)
