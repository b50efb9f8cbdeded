"""Text: the token ids that a cache has seen, used to detect another text.

transformers' `generate` does not compare: it skips as many of the given ids as the cache has seen.
"""

from __future__ import annotations

from torch import Tensor

FIRST_COLUMNS = 256  # capacity


class Text:
    """Ids [B, columns], padding included. They are unknown from the first embeddings on, or from
    the first step that ran without the host."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self.columns = 0

    def add(self, ids: Tensor | None, first: int) -> None:
        """Set the columns from `first` on to ids [B, n] and drop the columns after them."""
        self.columns = min(self.columns, first)
        if self.columns < first or ids is None:
            return  # as `columns` stays behind, `known` says so
        end = first + ids.shape[1]
        if self._ids is None or first == 0 or end > self._ids.shape[1]:
            room = ids.new_zeros(len(ids), max(FIRST_COLUMNS, 2 * end))
            if first and self._ids is not None:
                room[:, :first] = self._ids[:, :first]
            self._ids = room
        self._ids[:, first:end] = ids
        self.columns = end

    def known(self, columns: int) -> Tensor | None:
        """The ids of a cache with this many columns; None if they are not known."""
        return self._ids[:, :columns] if self._ids is not None and self.columns >= columns else None

    @property
    def nbytes(self) -> int:
        """Bytes of the ids, including spare room."""
        return 0 if self._ids is None else self._ids.untyped_storage().nbytes()

    def select(self, rows: Tensor) -> None:
        """Rows become `rows` ([B'] int64 indices)."""
        if self._ids is not None:
            self._ids = self._ids[rows.to(self._ids.device)]


def first_difference(
    seen: Tensor, given: Tensor, seen_mask: Tensor, given_mask: Tensor
) -> tuple[int, int] | None:
    """The first column in which texts [B, n] differ, and a row there; None if they are equal.

    Args:
        seen_mask, given_mask: [B, n] bool, False for padding, whose ids do not matter.
    """
    differs = (seen_mask != given_mask) | (seen_mask & (seen != given))
    column = int(differs.any(0).int().argmax())
    rows = differs[:, column].nonzero()
    return (column, int(rows[0])) if len(rows) else None
