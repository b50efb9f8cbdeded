"""NgramTable: what a model has said would come next, by the last tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """Tokens and their probabilities [top], the length of the context that was found, and whether
    the model has said them, or else they were only read."""

    tokens: np.ndarray
    probs: np.ndarray
    order: int
    said: bool


class NgramTable:
    """Sparse next-token distributions by context, of arXiv 2506.04708 (STAND), section 3.1.

    An entry holds the likeliest tokens and their probabilities. When a context is seen for the k-th
    further time, the old distribution weighs k / (k + 1) and the new one 1 / (k + 1), and the
    likeliest are kept.

    Args:
        orders: lengths of the contexts, the longest first.
        top: tokens of an entry.
    """

    def __init__(self, orders: Sequence[int], top: int) -> None:
        self.orders, self.top = tuple(orders), top
        self._none = np.arange(0, -top, -1, dtype=np.int32)  # no tokens, of which each is another
        self.clear()

    def clear(self) -> None:
        self._unread: list[tuple[list[int], int]] = []  # texts, and where to begin
        self._rows: dict[int, int] = {}  # hash of a context -> its row
        self._tokens = np.zeros((256, self.top), np.int32)
        self._probs = np.zeros((256, self.top), np.float32)
        self._seen = np.zeros(256, np.int32)
        self._said = np.zeros(256, np.bool_)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Of the entries, without the index."""
        parts = self._tokens, self._probs, self._seen, self._said
        return sum(part.nbytes for part in parts)

    def learn(
        self,
        ids: Sequence[int],
        tokens: Sequence[int],
        probs: Sequence[float],
        said: bool = True,
    ) -> None:
        """Behind ids come these tokens, with these probabilities, the likeliest first, as the model
        has said, or as they were read."""
        for order in self.orders:
            if len(ids) < order:
                continue
            key = hash(tuple(ids[-order:]))
            row = self._rows.get(key)
            if row is None:
                row = self._rows[key] = len(self._rows)
                self._grow(row)
                self._tokens[row], self._probs[row] = tokens, probs
            else:
                self._merge(row, tokens, probs)
            self._seen[row] += 1
            self._said[row] |= said

    def read(self, ids: Sequence[int], start: int = 0) -> None:
        """A text that is given, of which all before `start` is known: what came next in it was
        sure, and nothing is known beside it. It is read when something is looked up, as most runs
        rest most of the time."""
        before = max(start - self.orders[0], 0)
        self._unread.append((list(ids[before:]), start - before))

    def catch_up(self) -> None:
        """Read what there is to read."""
        texts, self._unread = self._unread, []
        for ids, start in texts:
            for place in range(max(start, min(self.orders)), len(ids)):
                for order in self.orders:
                    if place >= order:
                        self._read(hash(tuple(ids[place - order : place])), ids[place])

    def find(self, ids: Sequence[int]) -> Entry | None:
        """What is known behind the longest context of ids that is known."""
        self.catch_up()
        for order in self.orders:
            if len(ids) >= order:
                row = self._rows.get(hash(tuple(ids[-order:])))
                if row is not None:
                    return Entry(self._tokens[row], self._probs[row], order, bool(self._said[row]))
        return None

    def _read(self, key: int, token: int) -> None:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._rows)
            self._grow(row)
            self._tokens[row], self._probs[row] = self._none, 0.0
            self._tokens[row, 0], self._probs[row, 0] = token, 1.0
        else:
            self._add(row, token)
        self._seen[row] += 1

    def _add(self, row: int, token: int) -> None:
        """`_merge` with a token that was sure."""
        tokens, probs, weight = self._tokens[row], self._probs[row], 1 / (self._seen[row] + 1)
        probs *= 1 - weight
        ids = tokens.tolist()
        place = ids.index(token) if token in ids else self.top - 1
        chance = probs[place] * (ids[place] == token) + weight
        if chance < probs[place]:
            return
        while place and probs[place - 1] < chance:
            tokens[place], probs[place] = tokens[place - 1], probs[place - 1]
            place -= 1
        tokens[place], probs[place] = token, chance

    def _merge(self, row: int, tokens: Sequence[int], probs: Sequence[float]) -> None:
        seen = int(self._seen[row])
        known = zip(self._tokens[row].tolist(), self._probs[row].tolist(), strict=True)
        both = {token: p * seen / (seen + 1) for token, p in known}
        for token, p in zip(tokens, probs, strict=True):
            both[token] = both.get(token, 0.0) + p / (seen + 1)
        best = sorted(both.items(), key=lambda item: -item[1])[: self.top]
        self._tokens[row], self._probs[row] = zip(*best, strict=True)

    def _grow(self, row: int) -> None:
        if row == len(self._seen):
            for name in ("_tokens", "_probs", "_seen", "_said"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
