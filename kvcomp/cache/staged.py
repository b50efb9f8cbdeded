"""Staged: drafts of the next tokens of a layer, which attend before they are accepted.

The K and V of m drafts are written into the slots behind `seq_lens`, where the next append
overwrites them. Nothing else changes, so nothing has to be undone: `accept` appends accepted drafts
one by one, as decode steps would, for methods that note each step; `accept_many` takes them at once
for the others; and `unstage` drops the rest. This allows speculative decoding with methods that
evict or retrieve.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.arrivals import Arrivals
from kvcomp.cache.attended import Attended
from kvcomp.cache.rows import Rows
from kvcomp.cache.view import Read

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvcomp.cache.hosted import Hosted
    from kvcomp.cache.kv_cache import KVCache


class Staged(Attended):
    """The part of a layer that holds drafts.

    Attributes:
        staged: number of drafts of each row that wait for `accept` and `unstage`. The first is the
            last sampled token and always accepted.
        drafts: the method's notes on them, [B, m, ...] each.
        counts: [B] int32, drafts of each row, the first of the m; None: m.
    """

    staged: int
    drafts: dict[str, Tensor]
    counts: Tensor | None
    _drafted: tuple[Tensor, ...]  # K and V

    if TYPE_CHECKING:
        position: int
        columns: int
        first: bool
        added: int | Tensor
        seq_lens: Tensor
        logical_lens: Tensor
        _arrivals: Arrivals
        sinks: Tensor | None
        softcap: float | None
        hosted: Hosted

        @property
        def is_hosted(self) -> bool: ...
        @property
        def cache(self) -> KVCache: ...
        def settle(self) -> None: ...
        def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None: ...
        def _place(self, new: Rows) -> None: ...

    def reset(self) -> None:
        super().reset()
        self.unstage()

    def stage(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Put drafts behind the tokens of every row: k, v [B, Hkv, m, D], of which the first
        counts [B] int32 are drafts; None: all.

        Raises:
            ValueError: the layer is empty or has drafts already, or the shapes do not fit it.
        """
        if not self.allocated or self.staged:
            what = "drafts wait already" if self.staged else "the layer has no tokens yet"
            raise ValueError(f"kvcomp: stage: {what}")
        drafted = k.detach(), v.detach()
        k, v = self._as_kept(*drafted)
        self._check(k, v, None)
        self._drafted, self.staged, self.counts = drafted, k.shape[2], counts
        new = self._encoded(k, v)
        self._reserve(new.part(slice(1)), self.max_len + self.staged)
        self._place(new)

    def accept(self, index: int, valid: Tensor | None) -> None:
        """Accept draft `index` in rows where valid [B] is True; None: in all rows."""
        k, v = (x[:, :, index : index + 1] for x in self._drafted)
        self.append(k, v, None if valid is None else valid[:, None])

    def accept_many(self, count: int, added: int | Tensor, valid: Tensor | None) -> None:
        """Accept the first `count` drafts, in rows where valid [B, count] is True, at once: they
        lie where they belong already.

        Args:
            added: of each row, a number or [B] int32.
        """
        self.added, self.first = added, False
        self.seq_lens += added
        self.logical_lens += added
        self.max_len += count
        self.columns += count
        self._arrivals.add(count, valid)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A context in which `accept` and the method work on copies of all device memory. After it
        everything is as before, except pool rows in host memory that belong to no unit."""
        owners = [self, self.hosted.index] if self.is_hosted else [self]
        self.settle()
        kept = [dict(owner.__dict__) for owner in owners]
        try:
            for owner in owners:
                owner.__dict__.update(
                    {name: _copied(value) for name, value in owner.__dict__.items()}
                )
            yield
        finally:
            for owner, before in zip(owners, kept, strict=True):
                owner.__dict__.clear()
                owner.__dict__.update(before)

    def unstage(self) -> None:
        """Drop the drafts."""
        self.staged = 0
        self._drafted, self.drafts, self.counts = (), {}, None

    @property
    def seen_and_staged(self) -> int:
        """The number of columns, including the drafts."""
        return self.columns + self.staged

    def staged_lens(self) -> Tensor:
        """[B, m] int32: tokens that each draft sees, itself included."""
        own = torch.arange(1, self.staged + 1, dtype=torch.int32, device=self.seq_lens.device)
        return self.seq_lens[:, None] + own

    def attend_staged(self, q: Tensor, scale: float, **read: Unpack[Read]) -> tuple[Tensor, Tensor]:
        """The drafts attend to the tokens before them and to earlier drafts, in one read.

        Args:
            q: [B, Hq, m, D].
            read: one list of tokens for all drafts, which come last in it.

        Returns:
            out [B, m, Hq, D] and lse [B, m, Hq], sinks included. A draft gets the result of a
            decode step.
        """
        if self.counts is not None and not read:
            lens = self.seq_lens + self.counts
            self.cache.meter.verified(self.position, lens, self.counts)
            rows = self.stored(self.max_len + self.staged)
            return self._many_over(q, scale, rows, self.counts, seq_lens=lens)
        read.setdefault("seq_lens", self.seq_lens + self.staged)
        self.cache.meter.verified(self.position, read["seq_lens"], self.staged)
        return self._many_over(q, scale, self.stored(self.max_len + self.staged), **read)

    def _many_over(
        self,
        q: Tensor,
        scale: float,
        rows: Rows,
        q_lens: Tensor | None = None,
        **read: Unpack[Read],
    ) -> tuple[Tensor, Tensor]:
        k, v, words = rows
        q = self.query(q.transpose(1, 2))
        found = ops.append_attention(
            q, k, v, q_lens=q_lens, scale=scale, words=words, softcap=self.softcap, **read
        )
        return self.with_sinks(*found)

    def attend_apart(
        self, q: Tensor, scale: float, page_ids: Tensor, lens: Tensor, *, page_size: int
    ) -> Tensor:
        """Each draft attends to its own pages.

        Args:
            q: [B, Hq, m, D].
            page_ids: [B, m, 1 or Hkv, K] int32.
            lens: [B, m] int32, tokens in these pages.

        Returns:
            [B, m, Hq, D].
        """
        stored, outs = self.stored(self.max_len + self.staged), []
        for row, asked in enumerate(q.transpose(1, 2)):
            # Its drafts are the rows of a batch, over the same memory.
            parts = (part.expand(self.staged, *part.shape) for part in stored.row(row).parts)
            own: Read = {"page_ids": page_ids[row], "page_size": page_size, "seq_lens": lens[row]}
            outs.append(self.attend_over(asked, scale, Rows(*parts), **own)[0])
        return torch.stack(outs)


def _copied(value: Any) -> Any:
    """A copy: tensors with their strides, and other objects as far as they change in place."""
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.preserve_format)
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return value.joined(Arrivals()) if isinstance(value, Arrivals) else value
