"""Nucleus: draws of top-k and top-p sampling by noise, without sorting the vocabulary.

Top-p keeps the likeliest tokens up to a sum of p, for which transformers sorts all of the
vocabulary, and fills and scans it again for each of its warpers: on a CPU that takes nearly half as
long as a step of a small model. What they leave is mostly a few tokens. So a few are looked at, and
a draw counts if it is the same whatever rounding says about the border of the nucleus; the other
rows go through the warpers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvcomp.thinking.noise import gumbel

MOST = 64  # tokens that are looked at
ROUNDING = 2e-4  # of a sum over the vocabulary in fp32, at most
ORDER = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class Nucleus(NamedTuple):
    """What is kept of a distribution: the `top_k` likeliest tokens, with ties, and of these the
    likeliest up to a sum of `top_p`. None: all."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, warpers: Sequence[Any]) -> Nucleus | None:
        """That of transformers' warpers; None: they are others, or keep more than a few tokens."""
        places = [ORDER.index(type(each)) if type(each) in ORDER else -1 for each in warpers]
        if -1 in places or places != sorted(set(places)):
            return None
        by = dict(zip(places, warpers, strict=True))
        few = 1 in by and by[1].top_k < MOST
        if (1 in by and not few) or not (few or 2 in by):
            return None
        if 2 in by and by[2].min_tokens_to_keep != 1:
            return None
        return cls(
            by[0].temperature if 0 in by else 1.0,
            by[1].top_k if 1 in by else None,
            float(by[2].top_p) if 2 in by else None,
        )

    def draw(
        self, logits: Tensor, seed: int, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tokens that `GumbelNoise` draws behind the warpers.

        Args:
            logits: [R, V], of any floating type.
            rows, places: [R], of the noise.

        Returns:
            tokens [R]; sure [R] bool, False where rounding decides and the warpers must; ids [R, k]
            of the likeliest tokens and their probabilities in the nucleus, 0 for those outside.
        """
        values, ids = logits.topk(min(MOST, logits.shape[1]))
        values = values.float() / self.temperature
        whole = values.shape[1] == logits.shape[1]
        kept = torch.ones_like(values, dtype=torch.bool)
        if self.top_k is not None:
            kept = values >= values[:, min(self.top_k, values.shape[1]) - 1, None]
            probs = values.double().masked_fill(~kept, -torch.inf).softmax(1)
        else:
            probs = (logits.float() / self.temperature).softmax(1).gather(1, ids).double()
        certain = possible = kept
        if self.top_p is not None:
            # Sums over the tokens that are likelier than each, and over those not less likely
            sums = torch.nn.functional.pad(probs.cumsum(1), (1, 0))
            rising = -values
            above = sums.gather(1, torch.searchsorted(rising, rising))
            others = sums.gather(1, torch.searchsorted(rising, rising, right=True)) - probs
            rest = 1 - self.top_p
            certain = kept & (1 - others > rest + ROUNDING)
            possible = kept & (1 - above > rest - ROUNDING)
        count = values.shape[1]
        noise = gumbel(
            seed, rows.repeat_interleave(count), places.repeat_interleave(count), ids.flatten()
        )
        noisy = values.double() + noise.view_as(values)
        drawn = noisy.masked_fill(~possible, -torch.inf).argmax(1, keepdim=True)
        sure = certain.gather(1, drawn)[:, 0]  # the first of those possible is certain
        if not whole:  # all that may be in the nucleus are among those looked at
            sure &= ~(possible if self.top_k is None else kept)[:, -1]
        probs = probs * possible
        probs = (probs / probs.sum(1, keepdim=True)).float()
        return ids.gather(1, drawn)[:, 0], sure, ids, probs


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [R, count] of the likeliest tokens, by scores [R, V], and their probabilities."""
    ids = scores.topk(min(count, scores.shape[1])).indices
    return ids, scores.softmax(1).gather(1, ids)
