"""Drafts within a chunk: what `ChunkedCache` does where several tokens are checked at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcomp.hf.cache import Cache
from kvcomp.hf.layer import taken_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvcomp.hf.next_context import Encode
    from kvcomp.methods.delethink import Chunk, Delethink


class ChunkedDrafts:
    """The part of a `ChunkedCache` that stages and commits; the current context does the work."""

    staging: bool  # whether the tokens of the next forward are drafts

    if TYPE_CHECKING:
        context: Cache
        chunk: Chunk
        method: Delethink
        produced: int
        prompt_columns: int
        _renews: Callable[[Cache, int], bool]

        def get_seq_length(self, layer_idx: int = 0) -> int: ...
        def _encode_ahead(self, encode: Encode) -> None: ...
        def _placed(self, first: int, count: int) -> dict[str, Tensor | None]: ...
        def _add_output(self, ids: Tensor) -> None: ...

    @property
    def room(self) -> float:
        """As `Cache.room`. A boundary comes between two commits, with a token by itself."""
        room = max(min(self.context.room, self.chunk.stop - self.produced - 1), 1)
        if self.prompt_columns:
            seen = self.context.get_seq_length()
            for count in range(1, int(room) + 1):
                if self._renews(self.context, seen + count):
                    return max(count - 1, 1)
        return room

    def stage(self) -> None:
        """As `Cache.stage`.

        Raises:
            ValueError: the inner method knows no drafts.
        """
        self.context.stage()
        self.context.staging = False  # until the forward comes
        self.staging = True

    def _enter_drafts(self, ids: Tensor, encode: Encode) -> dict[str, Any]:
        self.staging = False
        if ids.shape[1] > self.room or self.produced + 1 == self.chunk.stop:
            raise ValueError(
                f"kvcomp: delethink: expected drafts within the chunk, at most {self.room}, and"
                f" no drafts for its last token; got {ids.shape[1]}"
            )
        if self.method.reset == "streaming":
            self._encode_ahead(encode)
        self.context.stage()
        return self._placed(self.context.get_seq_length(), ids.shape[1])

    def commit(self, counts: int | Tensor) -> None:
        """As `Cache.commit`; one number for all rows, as a chunk ends for all of them at once.

        Raises:
            ValueError: see `KVCache.commit`, or rows that differ.
        """
        given = set(counts.tolist() if isinstance(counts, Tensor) else [counts])
        if len(given) > 1:
            raise ValueError(
                "kvcomp: commit: delethink takes the rows of a batch through a chunk together;"
                f" expected one number for all, got {counts}"
            )
        count, ids = given.pop(), self.context.drafts
        self.context.commit(count)
        if ids is not None:
            self._add_output(ids[:, :count])

    def discard(self) -> None:
        """The staged tokens have never been."""
        self.context.discard()

    def drop_drafts(self) -> None:
        """As `Cache.drop_drafts`."""
        self.staging = False
        self.context.drop_drafts()

    def crop(self, tokens: int) -> None:
        """Take back staged tokens, see `Cache.crop`; no others.

        Raises:
            ValueError: there are none.
        """
        staged = self.context.kv.staged
        count = taken_back(tokens, self.get_seq_length() + staged)
        if staged:
            self.commit(staged - count)
        elif count:
            raise ValueError(
                f"kvcomp: delethink cannot take tokens back: {self.method.one_way} (crop)"
            )
