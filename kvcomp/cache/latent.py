"""LatentLayer: a layer of multi-head latent attention (MLA), one row a token for all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.rows import Rows
from kvcomp.cache.view import Read

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvcomp.cache.kv_cache import KVCache


class LatentLayer(LayerCache):
    """Rows [B, 1, capacity, D] of one KV head: a token's latent, then its rotated key.

    The whole row is the token's key, and its latent is its value, for queries that have been
    brought into the latent space. So `keys` and `values` overlap, and no V is stored.

    Attributes:
        rank: columns of the latent.
    """

    def __init__(self, cache: KVCache, position: int, rank: int) -> None:
        self.rank = rank
        super().__init__(cache, position)

    @property
    def values(self) -> Tensor:
        """[B, 1, max_len, rank]; row b is valid up to seq_lens[b]."""
        return self.keys[..., : self.rank]

    def _as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of latents k [B, 1, n, rank] and rotated keys v [B, 1, n, R], and no V.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        if k.ndim != 4 or k.shape[1] != 1 or k.shape[3] != self.rank or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"kvcomp: append: expected latents [B, 1, n, {self.rank}] and rotated keys"
                f" [B, 1, n, R], got {list(k.shape)} and {list(v.shape)}"
            )
        rows = torch.cat([k, v], -1)
        return rows, rows[..., :0]

    def repeat_heads(self, heads: int) -> None:
        raise ValueError(
            "kvcomp: sets of tokens per query head need K and V of each head, and the layers of"
            " this model cache a latent for all heads (MLA); use another unit than 'query_head'"
        )

    def _over(
        self, q: Tensor, scale: float, rows: Rows, **read: Unpack[Read]
    ) -> tuple[Tensor, Tensor]:
        """`latent_attention`: out [B, Hq, rank], lse [B, Hq]."""
        latents = rows.k[:, 0]
        return ops.latent_attention(q, latents, value_dim=self.rank, scale=scale, **read)

    def _many_over(
        self,
        q: Tensor,
        scale: float,
        rows: Rows,
        q_lens: Tensor | None = None,
        **read: Unpack[Read],
    ) -> tuple[Tensor, Tensor]:
        """One draft after another: out [B, m, Hq, rank], lse [B, m, Hq]."""
        logits, count = read.pop("logits", None), q.shape[2]
        lens, found = read.pop("seq_lens"), []
        last = count - 1 if q_lens is None else q_lens - 1
        for index in range(count):
            own = read.copy()
            own["seq_lens"] = lens - (last - index)
            if logits is not None:
                own["logits"] = logits[:, index]
            found.append(self._over(q[:, :, index], scale, rows, **own))
        out, lse = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        return out, lse

    def attend_and_select(self, q: Tensor, scale: float, **selection: Any) -> tuple[Tensor, ...]:
        """`attend` with logits, `page_scores` of them and `select_pages` by these scores; the
        arguments of the ops."""
        logits, page_size = selection.pop("logits"), selection.pop("page_size")
        out, lse = self.attend(q, scale, logits=logits)
        scores = ops.page_scores(logits[..., : self.max_len], lse, self.seq_lens, page_size)
        return out, lse, scores, *ops.select_pages(scores, self.seq_lens, page_size, **selection)
