"""Draws: the tokens that a check of drafts draws behind each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcomp.thinking.noise import GumbelNoise
from kvcomp.thinking.nucleus import draw_nucleus, likeliest

# Processors for which a row is like any other, whatever its tokens are.
OF_ANY_ROW = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper

Drawn = tuple[int, list[int], list[float]]  # a token, and the likeliest with their probabilities


class Draws:
    """Logits processors and noise of one call of `generate`.

    Args:
        processors: the last may be a `GumbelNoise`, which counts instead of `noise`.
        noise: None: greedy.
        rows: of the batch.
        top: tokens whose probabilities are told.
    """

    def __init__(
        self, processors: Sequence[Any], noise: GumbelNoise | None, rows: int, top: int
    ) -> None:
        given = [p for p in processors if isinstance(p, GumbelNoise)]
        self.noise = given[0] if given else noise
        self.processors = [p for p in processors if not isinstance(p, GumbelNoise)]
        self.rows, self.top = rows, top

    @property
    def at_once(self) -> bool:
        """Whether draws do not depend on the tokens before, so that all are made together."""
        return all(isinstance(each, OF_ANY_ROW) for each in self.processors)

    def all(self, logits: Tensor, numbers: Tensor, ends: Tensor) -> list[Drawn]:
        """Behind each of R nodes: logits [R, V], the numbers of their rows [R], and the tokens up
        to each [R]. Only for draws that are made `at_once`."""
        scores, nothing = logits.float(), logits.new_zeros(len(logits), 0, dtype=torch.long)
        last = self.processors[-1] if self.processors else None
        if self.noise is None or not (
            isinstance(last, TopPLogitsWarper) and last.min_tokens_to_keep == 1
        ):
            for each in self.processors:
                scores = each(nothing, scores)
            return self._drawn(scores, numbers, ends)
        for each in self.processors[:-1]:
            scores = each(nothing, scores)
        tokens, sure, probs, ids = draw_nucleus(
            scores, float(last.top_p), self.noise.seed, numbers, ends
        )
        if not bool(sure.all()):
            rest = ~sure
            tokens[rest] = self.noise.draw(
                last(nothing[rest], scores[rest]), numbers[rest], ends[rest]
            )
        known = ids[:, : self.top].tolist(), probs[:, : self.top].tolist()
        return list(zip(tokens.tolist(), *known, strict=True))

    def behind(self, logits: Tensor, number: int, prefix: Tensor) -> Drawn:
        """Behind one prefix [1, n] of a row: logits [1, V]."""
        scores = logits.float()
        for each in self.processors:
            if self.rows == 1 or isinstance(each, OF_ANY_ROW):
                scores = each(prefix, scores)
            else:  # it may tell rows apart by their numbers
                scores = self._in_place(each, prefix, scores)[[number]]
        device = scores.device
        at = torch.tensor([number], device=device), torch.tensor([prefix.shape[1]], device=device)
        return self._drawn(scores, *at)[0]

    def _in_place(self, processor: Callable[..., Tensor], prefix: Tensor, scores: Tensor) -> Tensor:
        """What a processor makes of a row [1, n] at each number [B, n]."""
        return processor(prefix.repeat(self.rows, 1), scores.repeat(self.rows, 1))

    def _drawn(self, scores: Tensor, numbers: Tensor, ends: Tensor) -> list[Drawn]:
        probs, ids = likeliest(scores, self.top)
        noise = self.noise
        tokens = scores.argmax(1) if noise is None else noise.draw(scores, numbers, ends)
        return list(zip(tokens.tolist(), ids.tolist(), probs.tolist(), strict=True))
