"""Drafts: the tokens that may follow a row, as a table of n-grams has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvcomp.thinking.ngrams import Entry, NgramTable
from kvcomp.thinking.noise import GumbelNoise, gumbel

Kind = tuple[int, bool, int]
PRIOR = 4.0  # drafts that went as their probabilities say, before any was checked


@dataclass
class Draft:
    """The drafts of one row, one behind the other. Node 0 is its newest token, and drafts are the
    nodes from 1 on.

    Attributes:
        tokens: of the drafts.
        chances: how likely each is right, with all before it.
        kinds: of each, see `Trust`; None: it is known to be right.
    """

    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    kinds: list[Kind | None] = field(default_factory=list)

    @classmethod
    def known(cls, tokens: Sequence[int]) -> Draft:
        """Tokens that are known to come."""
        return cls(list(tokens), [1.0] * len(tokens), [None] * len(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, count: int) -> Draft:
        """The first drafts."""
        return Draft(self.tokens[:count], self.chances[:count], self.kinds[:count])


class Trust:
    """How often drafts of a kind were right, where all before them were.

    A kind is the length of the context, whether the model has said what comes or it was only read,
    and a tenth of the probability in the table.
    """

    def __init__(self) -> None:
        self._right: dict[Kind, float] = {}
        self._checked: dict[Kind, int] = {}

    def kind(self, entry: Entry) -> Kind:
        return entry.order, entry.said, int(10 * entry.probs[0])

    def chance(self, kind: Kind) -> float:
        """That a draft is right, given that all before it are."""
        before = (kind[-1] + 0.5) / 10.5
        return (self._right.get(kind, 0.0) + PRIOR * before) / (self._checked.get(kind, 0) + PRIOR)

    def note(self, draft: Draft, node: int, token: int) -> int | None:
        """Behind a node came this token. Returns the draft of it, if there is one."""
        if node == len(draft):
            return None
        right, kind = draft.tokens[node] == token, draft.kinds[node]
        if kind is not None:
            self._right[kind] = self._right.get(kind, 0.0) + right
            self._checked[kind] = self._checked.get(kind, 0) + 1
        return node + 1 if right else None


class Drafter:
    """Writes chains of drafts by a table.

    The draft behind a token is the one that the noise of its place puts first, as the check draws
    by the same noise. Without noise it is the likeliest.

    Args:
        depth: drafts one behind the other, at most.
        sure: a chain ends before a draft that is less likely than this.
    """

    def __init__(self, table: NgramTable, *, depth: int, sure: float) -> None:
        self.table, self.depth, self.sure = table, depth, sure
        self.trust = Trust()

    def draft(
        self,
        rows: Sequence[tuple[int, int, list[int]]],
        known: Sequence[list[int]],
        most: int,
        noise: GumbelNoise | None,
    ) -> list[Draft]:
        """Drafts of some rows.

        Args:
            rows: the number, the tokens so far and the last tokens of each.
            known: tokens of each that have been checked already; they come first.
            most: drafts one behind the other, at most.
        """
        drafts = [Draft.known(tokens[:most]) for tokens in known]
        going = list(range(len(rows)))
        while going := [row for row in going if len(drafts[row]) < min(self.depth, most)]:
            found = [(row, self.table.find([*rows[row][2], *drafts[row].tokens])) for row in going]
            entries = [(row, entry) for row, entry in found if entry is not None]
            if not entries:
                break
            at = [(rows[row][0], rows[row][1] + len(drafts[row])) for row, _ in entries]
            going = []
            for (row, entry), token in zip(
                entries, _first([entry for _, entry in entries], at, noise), strict=True
            ):
                draft, kind = drafts[row], self.trust.kind(entry)
                before = draft.chances[-1] if draft.chances else 1.0
                chance = before * self.trust.chance(kind)
                if chance >= self.sure:
                    draft.tokens.append(token)
                    draft.chances.append(chance)
                    draft.kinds.append(kind)
                    going.append(row)
        return drafts


def _first(
    entries: list[Entry], places: list[tuple[int, int]], noise: GumbelNoise | None
) -> list[int]:
    """The token of each entry that the noise at (row, position) puts first."""
    tokens = np.stack([entry.tokens for entry in entries])
    if noise is None:
        return tokens[:, 0].tolist()
    probs = np.stack([entry.probs for entry in entries])
    numbers, ends = torch.tensor(places).repeat_interleave(tokens.shape[1], 0).unbind(1)
    drawn = gumbel(noise.seed, numbers, ends, torch.from_numpy(tokens).flatten().long())
    scores = torch.from_numpy(probs).double().log() + drawn.view(probs.shape)
    best = scores.argmax(1)[:, None]
    return torch.from_numpy(tokens).gather(1, best)[:, 0].tolist()
