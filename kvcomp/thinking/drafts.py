"""Drafts: the tokens that may follow a row, as a table of n-grams has them; a chain or a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvcomp.thinking.ngrams import Entry, NgramTable
from kvcomp.thinking.noise import GumbelNoise, gumbel

# Places in a tree, as ranks among the children of one node from the root down, and how often a
# draft there is right.
Shape = Mapping[tuple[int, ...], float]
Kind = tuple[int, bool, int, int]
Child = tuple[int, int, float, Kind]  # rank, token, chance, kind
PRIOR = 4.0  # drafts that went as their probabilities say, before any was checked


@dataclass
class Draft:
    """The drafts of one row. Node 0 is its newest token, and drafts are the nodes from 1 on.

    Attributes:
        tokens: of the drafts; each comes behind its parent.
        parents: the node before each.
        chances: how likely each is right, with all before it.
        kinds: of each, see `Trust`; None: it is known to be right.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    kinds: list[Kind | None] = field(default_factory=list)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """Tokens that are known to come."""
        count = len(tokens)
        return cls(list(tokens), list(range(count)), [1.0] * count, [None] * count)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(len(self)))

    @property
    def depths(self) -> list[int]:
        """Of the drafts, from 1."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def cut(self, count: int) -> Draft:
        """The first drafts."""
        return Draft(
            self.tokens[:count], self.parents[:count], self.chances[:count], self.kinds[:count]
        )

    def children(self, node: int) -> list[int]:
        """The drafts behind a node, the likeliest first."""
        return [number for number, parent in enumerate(self.parents, 1) if parent == node]

    def best(self, count: int) -> Draft:
        """The likeliest drafts, which include what is before each of them, the likeliest first."""
        order = sorted(range(len(self)), key=lambda index: -self.chances[index])[:count]
        places = {0: 0} | {index + 1: place for place, index in enumerate(order, 1)}
        return Draft(
            [self.tokens[index] for index in order],
            [places[self.parents[index]] for index in order],
            [self.chances[index] for index in order],
            [self.kinds[index] for index in order],
        )


class Trust:
    """How often drafts of a kind were right, where all before them were.

    A kind is the length of the context, whether the model has said what comes or it was only read,
    the rank among the children of a node, and a tenth of the probability in the table.
    """

    def __init__(self) -> None:
        self._right: dict[Kind, float] = {}
        self._checked: dict[Kind, int] = {}

    def kind(self, entry: Entry, rank: int) -> Kind:
        return entry.order, entry.said, rank, int(10 * entry.probs[0])

    def chance(self, kind: Kind) -> float:
        """That a draft is right, given that those of lower ranks are wrong."""
        _, _, rank, tenth = kind
        before = (tenth + 0.5) / 10.5 if rank == 0 else 0.3
        return (self._right.get(kind, 0.0) + PRIOR * before) / (self._checked.get(kind, 0) + PRIOR)

    def note(self, draft: Draft, node: int, token: int) -> int | None:
        """Behind a node came this token. Returns the draft of it, if there is one."""
        for child in draft.children(node):
            right, kind = draft.tokens[child - 1] == token, draft.kinds[child - 1]
            if kind is not None:
                self._right[kind] = self._right.get(kind, 0.0) + right
                self._checked[kind] = self._checked.get(kind, 0) + 1
            if right:
                return child
        return None


@dataclass
class _Node:
    """A node of which the children are looked for."""

    row: int  # in the batch of drafts
    node: int
    chance: float
    context: list[int]
    depth: int
    ranks: tuple[int, ...]


class Drafter:
    """Writes drafts by a table.

    The children of a node are the tokens that the noise of their place puts first, as the check
    draws by the same noise: Gumbel-Top-K of the entry. Without noise they are the likeliest.

    Args:
        depth: drafts one behind the other, at most.
        nodes: drafts of a row, at most, the likeliest.
        branches: children of a node, at most. 1: a chain.
        sure: drafts less likely than this are left out.
        shape: places of a fixed tree, instead of `branches` and `sure`.
    """

    def __init__(
        self,
        table: NgramTable,
        *,
        depth: int,
        nodes: int,
        branches: int,
        sure: float,
        shape: Shape | None,
    ) -> None:
        self.table, self.depth, self.nodes = table, depth, nodes
        self.branches, self.sure, self.shape = branches, sure, shape
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
        drafts = [Draft.chain(tokens[:most]) for tokens in known]
        frontier = [
            _Node(row, len(draft), 1.0, [*rows[row][2], *draft.tokens], len(draft), ())
            for row, draft in enumerate(drafts)
        ]
        while frontier:
            frontier = [node for node in frontier if node.depth < min(self.depth, most)]
            below: list[_Node] = []
            for node, children in self._children(frontier, rows, noise):
                draft = drafts[node.row]
                for rank, token, chance, kind in children:
                    draft.tokens.append(token)
                    draft.parents.append(node.node)
                    draft.chances.append(chance)
                    draft.kinds.append(kind)
                    context, ranks = [*node.context[1:], token], (*node.ranks, rank)
                    below.append(
                        _Node(node.row, len(draft), chance, context, node.depth + 1, ranks)
                    )
            frontier = self._likeliest(below)
        return [draft.best(self.nodes) for draft in drafts]

    def _likeliest(self, nodes: list[_Node]) -> list[_Node]:
        """At most `nodes` of each row: what is behind others is no draft in the end."""
        if self.branches == 1 and self.shape is None:
            return nodes
        left: dict[int, int] = {}
        kept = []
        for node in sorted(nodes, key=lambda each: -each.chance):
            left[node.row] = left.get(node.row, self.nodes) - 1
            if left[node.row] >= 0:
                kept.append(node)
        return kept

    def _children(
        self,
        frontier: list[_Node],
        rows: Sequence[tuple[int, int, list[int]]],
        noise: GumbelNoise | None,
    ) -> list[tuple[_Node, list[Child]]]:
        """(rank, token, chance, kind) of the children of each node that has any."""
        found = [(node, self.table.find(node.context)) for node in frontier]
        known = [(node, entry) for node, entry in found if entry is not None]
        if not known:
            return []
        tokens = np.stack([entry.tokens for _, entry in known])
        probs = np.stack([entry.probs for _, entry in known])
        order = [list(range(tokens.shape[1]))] * len(known)
        if noise is not None:
            at = torch.tensor([(rows[n.row][0], rows[n.row][1] + n.depth) for n, _ in known])
            numbers, ends = at.repeat_interleave(tokens.shape[1], 0).unbind(1)
            drawn = gumbel(noise.seed, numbers, ends, torch.from_numpy(tokens).flatten().long())
            scores = torch.from_numpy(probs).double().log() + drawn.view(probs.shape)
            order = scores.argsort(1, descending=True).tolist()
        chosen = []
        for (node, entry), ids, shares, best in zip(
            known, tokens.tolist(), probs.tolist(), order, strict=True
        ):
            ranked = [ids[index] for index in best if shares[index] > 0]
            chosen.append((node, self._kept(node, ranked, entry)))
        return chosen

    def _kept(self, node: _Node, ranked: list[int], entry: Entry) -> list[Child]:
        """The children that are drafts."""
        found, left = [], node.chance
        most = len(ranked) if self.shape is not None else self.branches
        for rank, token in enumerate(ranked[:most]):
            kind = self.trust.kind(entry, rank)
            if self.shape is not None:
                place = self.shape.get((*node.ranks, rank))
                if place is None:
                    continue
                chance = min(place, node.chance)
            else:
                chance = left * self.trust.chance(kind)
                left -= chance
            if self.shape is not None or chance >= self.sure:
                found.append((rank, token, chance, kind))
        return found
