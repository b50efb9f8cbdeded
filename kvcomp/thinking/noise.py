"""Draws by noise: a sampled run is a function of its seed, however many tokens a step checks.

The largest of logit + Gumbel noise is a draw from the softmax (the Gumbel-max trick). The noise is
a hash of seed, row, position and token, not the next number of a generator. So a draft and the
check of it see the same noise, and speculation gives the tokens of decoding one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvcomp.thinking.checks import is_count, require

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
STEP = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class GumbelNoise(LogitsProcessor):
    """Leaves one token of each row, drawn by noise, for `generate(do_sample=True)` under
    `kvcomp.patch`, which applies it behind temperature, top-k and top-p.

        model.generate(**inputs, do_sample=True, logits_processor=[GumbelNoise(seed=7)])

    Args:
        seed: of all draws, from 0.

    Raises:
        ValueError: no such seed.
    """

    comes_last = True  # among the processors of `generate`, see `kvcomp.hf.turns`

    def __init__(self, seed: int = 0) -> None:
        require(is_count(seed), "GumbelNoise: seed", "a number from 0", seed)
        self.seed = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        drawn = self.draw(scores, rows, input_ids.shape[1])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

    def draw(self, scores: Tensor, rows: Tensor, position: int | Tensor) -> Tensor:
        """A token of each row: scores [R, V], -inf for what must not come, rows [R], one position
        or [R] -> [R]."""
        row, token = torch.isfinite(scores).nonzero(as_tuple=True)
        noisy = scores.new_full(scores.shape, -torch.inf, dtype=torch.float64)
        places = position if isinstance(position, int) else position[row]
        noise = gumbel(self.seed, rows[row], places, token)
        noisy[row, token] = scores[row, token].double() + noise
        return noisy.argmax(-1)


def gumbel(seed: int, rows: Tensor, position: int | Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise [n] fp64 for tokens [n] of rows [n] at one position or [n], int64."""
    key = mixed(torch.full_like(rows, _signed(seed * STEP)))
    key = mixed(key + rows)
    key = mixed(key + position)
    bits = mixed(key + tokens)
    uniform = ((bits >> 11) & (2**53 - 1)).double().add(0.5) / 2**53
    return -(-uniform.log()).log()


def mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on int64 whose overflow wraps."""
    x = x + _signed(STEP)
    for shift, factor in MIXERS:
        x = (x ^ _right(x, shift)) * _signed(factor)
    return x ^ _right(x, 31)


def _right(x: Tensor, shift: int) -> Tensor:
    """A shift of 64 bits without the sign."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x
