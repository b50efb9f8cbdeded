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
from kvcomp.cache.view import Read

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvcomp.cache.kv_cache import KVCache


class Attended(Slab):
    """The part of a layer that attends."""

    is_shared: bool
    _tokens: Read = later("a decode step")  # of the latest step, where shared

    if TYPE_CHECKING:
        position: int
        seq_lens: Tensor
        sinks: Tensor | None
        softcap: float | None

        @property
        def cache(self) -> KVCache: ...

    def attend(self, q: Tensor, scale: float, **read: Unpack[Read]) -> tuple[Tensor, Tensor]:
        """`decode_attention` over this layer, counted. Methods call the kernel only through this.

        Returns:
            out [B, Hq, D] and lse [B, Hq], sinks included.
        """
        read.setdefault("seq_lens", self.seq_lens)
        if self.is_shared:
            self._tokens = read.copy()
            self._tokens.pop("logits", None)
        # Only GPUs divide the tokens by the room that there is.
        rows = self.stored(self.capacity if self._k.is_cpu else None)
        return self.attend_over(q, scale, rows, **read)

    def attend_and_select(self, q: Tensor, scale: float, **selection: Any) -> tuple[Tensor, ...]:
        """`attend_and_select` over this layer, counted, for layers without `sinks`. `selection` is
        passed on.

        Returns:
            out [B, Hq, D], lse [B, Hq], scores, selected_ids and selected_lens.
        """
        self.cache.meter.attended(self.position, self.seq_lens)
        if self.is_shared:
            self._tokens = {"seq_lens": self.seq_lens}
        k, v, words = self.stored()
        q = self.query(q)
        return ops.attend_and_select(
            q, k, v, self.seq_lens, scale=scale, words=words, softcap=self.softcap, **selection
        )

    def attend_over(
        self, q: Tensor, scale: float, rows: Rows, **read: Unpack[Read]
    ) -> tuple[Tensor, Tensor]:
        """`attend` over rows of this layer, with their `seq_lens`."""
        self.cache.meter.attended(self.position, read["seq_lens"])
        return self._over(q, scale, rows, **read)

    def attend_again(self, q: Tensor, scale: float) -> Tensor:
        """Attention of another layer, which has no K and V of its own, to the tokens that this one
        has attended to in the same step. The meter counts them once.

        Returns:
            out [B, Hq, D].
        """
        return self._over(q, scale, self.stored(), **self._tokens)[0]

    def _over(
        self, q: Tensor, scale: float, rows: Rows, **read: Unpack[Read]
    ) -> tuple[Tensor, Tensor]:
        k, v, words = rows
        q = self.query(q)
        found = ops.decode_attention(
            q, k, v, scale=scale, words=words, softcap=self.softcap, **read
        )
        return self.with_sinks(*found)

    def with_sinks(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [..., Hq, D] and lse [..., Hq] after the model's learned sinks have taken their part
        of the softmax."""
        if self.sinks is None:
            return out, lse
        sinks = self.sinks.detach().float().expand_as(lse).flatten(0, -2).contiguous()
        flat = out.flatten(0, -3)
        merged, sums = ops.merge_states(flat, lse.flatten(0, -2), torch.zeros_like(flat), sinks)
        return merged.view_as(out), sums.view_as(lse)
