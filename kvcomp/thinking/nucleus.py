"""Nucleus: draws of top-p sampling by noise, without sorting the vocabulary.

Top-p keeps the likeliest tokens up to a sum of p, for which transformers sorts all of the
vocabulary: on a CPU that takes nearly half as long as a step of a small model. The nucleus is
mostly a few tokens. So a few are looked at, and a draw counts if it is the same whatever rounding
says about the border of the nucleus; the other rows are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.thinking.noise import gumbel

MOST = 64  # tokens that are looked at
ROUNDING = 2e-4  # of a sum over the vocabulary in fp32, at most


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Probabilities [R, count] fp32 and ids of the likeliest tokens, by scores [R, V]."""
    values, ids = scores.topk(min(count, scores.shape[1]))
    return (values - scores.logsumexp(1, keepdim=True)).exp(), ids


def draw_nucleus(
    scores: Tensor, top_p: float, seed: int, rows: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens that `GumbelNoise` draws behind `TopPLogitsWarper(top_p)`.

    Args:
        scores: [R, V] fp32, not filtered yet.
        rows, places: [R], of the noise.

    Returns:
        tokens [R]; sure [R] bool, False where the border of the nucleus decides and the vocabulary
        must be sorted; probabilities [R, k] and ids of the likeliest tokens in the nucleus, 0 for
        those outside.
    """
    values, ids = scores.topk(min(MOST, scores.shape[1]))
    probs = (values.double() - scores.logsumexp(1, keepdim=True)).exp()
    # Of the tokens that are likelier than each, and of all others that are not less likely
    above = ((values[:, None] > values[:, :, None]) * probs[:, None]).sum(2)
    others = ((values[:, None] >= values[:, :, None]) * probs[:, None]).sum(2) - probs
    rest = 1 - top_p
    certain = 1 - others > rest + ROUNDING
    possible = 1 - above > rest - ROUNDING
    whole = values.shape[1] == scores.shape[1]
    covered = torch.ones_like(possible[:, -1]) if whole else ~possible[:, -1]
    count = values.shape[1]
    noise = gumbel(
        seed, rows.repeat_interleave(count), places.repeat_interleave(count), ids.flatten()
    )
    noisy = values.double() + noise.view_as(values)
    drawn, other = (
        noisy.masked_fill(~allowed, -torch.inf).argmax(1) for allowed in (certain, possible)
    )
    kept = probs * possible
    return (
        ids.gather(1, other[:, None])[:, 0],
        covered & certain.any(1) & (drawn == other),
        (kept / kept.sum(1, keepdim=True)).float(),
        ids,
    )
