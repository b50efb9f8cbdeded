"""Draws: the tokens that a check of drafts draws behind each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcomp.thinking.noise import GumbelNoise
from kvcomp.thinking.nucleus import Nucleus, likeliest

# Processors for which a row is like any other, whatever its tokens are.
OF_ANY_ROW = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper
AT_ONCE = 2**18  # logits that are looked at together; more take fresh memory at each step


class Drawn(NamedTuple):
    """A token, and the likeliest ones with their probabilities; nothing where they are not told."""

    token: int
    ids: Sequence[int] = ()
    probs: Sequence[float] = ()


@runtime_checkable
class Looking(Protocol):
    """A logits processor that looks into the cache behind some tokens, and remembers it."""

    def begin(self, rows: int) -> None:
        """Another generation of so many rows begins."""

    def looks(self, ids: Tensor) -> bool:
        """Whether it looks behind a prefix [1, n]."""

    def behind(self, row: int, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] behind a prefix [1, n] of a row."""


class Draws:
    """Logits processors and noise of one call of `generate`.

    Args:
        processors: the last may be a `GumbelNoise`, which counts instead of `noise`.
        noise: None: greedy.
        rows: of the batch.
        top: tokens whose probabilities are told, where they are.
    """

    def __init__(
        self, processors: Sequence[Any], noise: GumbelNoise | None, rows: int, top: int
    ) -> None:
        given = [p for p in processors if isinstance(p, GumbelNoise)]
        self.noise = given[0] if given else noise
        self.processors = [p for p in processors if not isinstance(p, GumbelNoise)]
        self.rows, self.top = rows, top
        self.nucleus = None if self.noise is None else Nucleus.of(self.processors)
        self.looking = [p for p in self.processors if isinstance(p, Looking)]
        for each in self.looking:
            each.begin(rows)

    def looks(self, prefix: Tensor) -> bool:
        """Whether the cache must hold a prefix [1, n], and nothing else, before it is drawn behind
        it."""
        return any(each.looks(prefix) for each in self.looking)

    @property
    def at_once(self) -> bool:
        """Whether draws do not depend on the tokens before, so that all are made together."""
        return all(isinstance(each, OF_ANY_ROW) for each in self.processors)

    def all(self, logits: Tensor, numbers: Tensor, ends: Tensor, told: bool) -> list[Drawn]:
        """Behind each of R nodes: logits [R, V], the numbers of their rows [R], and the tokens up
        to each [R]. Only for draws that are made `at_once`."""
        count = max(AT_ONCE // logits.shape[1], 1)
        if len(logits) > count:
            parts = zip(logits.split(count), numbers.split(count), ends.split(count), strict=True)
            return [drawn for part in parts for drawn in self.all(*part, told)]
        nothing = logits.new_zeros(len(logits), 0, dtype=torch.long)
        if self.noise is None or self.nucleus is None:
            return self._drawn(self._processed(nothing, logits), numbers, ends, told)
        tokens, sure, ids, probs = self.nucleus.draw(logits, self.noise.seed, numbers, ends)
        if not bool(sure.all()):
            rest = ~sure
            scores = self._processed(nothing[rest], logits[rest])
            tokens[rest] = self.noise.draw(scores, numbers[rest], ends[rest])
        if not told:
            return list(map(Drawn, tokens.tolist()))
        known = ids[:, : self.top].tolist(), probs[:, : self.top].tolist()
        return list(map(Drawn, tokens.tolist(), *known))

    def behind_all(self, logits: Tensor, prefixes: Tensor) -> list[Drawn]:
        """Behind the prefixes [B, n] of all rows, which are equally long: logits [B, V]."""
        numbers = torch.arange(self.rows, device=logits.device)
        ends = torch.full_like(numbers, prefixes.shape[1])
        return self._drawn(self._processed(prefixes, logits), numbers, ends, told=False)

    def behind(self, logits: Tensor, number: int, prefix: Tensor, told: bool) -> Drawn:
        """Behind one prefix [1, n] of a row: logits [1, V]."""
        scores = logits.float()
        for each in self.processors:
            if isinstance(each, Looking):
                scores = each.behind(number, prefix, scores)
            elif self.rows == 1 or isinstance(each, OF_ANY_ROW):
                scores = each(prefix, scores)
            else:  # it may tell rows apart by their numbers
                scores = self._in_place(each, prefix, scores)[[number]]
        device = scores.device
        at = torch.tensor([number], device=device), torch.tensor([prefix.shape[1]], device=device)
        return self._drawn(scores, *at, told)[0]

    def _processed(self, prefixes: Tensor, logits: Tensor) -> Tensor:
        scores = logits.float()
        for each in self.processors:
            scores = each(prefixes, scores)
        return scores

    def _in_place(self, processor: Callable[..., Tensor], prefix: Tensor, scores: Tensor) -> Tensor:
        """What a processor makes of a row [1, n] at each number [B, n]."""
        return processor(prefix.repeat(self.rows, 1), scores.repeat(self.rows, 1))

    def _drawn(self, scores: Tensor, numbers: Tensor, ends: Tensor, told: bool) -> list[Drawn]:
        noise = self.noise
        tokens = scores.argmax(1) if noise is None else noise.draw(scores, numbers, ends)
        if not told:
            return list(map(Drawn, tokens.tolist()))
        known = (each.tolist() for each in likeliest(scores, self.top))
        return list(map(Drawn, tokens.tolist(), *known))
