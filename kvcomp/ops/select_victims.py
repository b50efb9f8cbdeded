"""select_victims: select the tokens to evict by score; the newest tokens are protected."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def select_victims(
    scores: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    kept_lens: Tensor,
    num_victims: int,
    *,
    num_recent: int = 0,
) -> Tensor:
    """Select the `seq_lens - kept_lens` tokens with the lowest scores in each row and unit.

    At equal scores the older token is evicted, so that equal scores give a sliding window. NaN
    counts as the lowest score. The order of the slots does not matter: permuting the slots permutes
    the victims.

    Args:
        scores: [B, U, N] fp32, high scores stay; rows may be strided. Each of the U units has its
            own set.
        positions: [B, U, N] int32, distinct within a unit's valid slots; rows may be strided.
        seq_lens: [B] int32, valid tokens of each row, at most N.
        kept_lens: [B] int32, tokens that stay; a row with no more tokens than that loses none.
        num_victims: V, at least the number of tokens that any row loses.
        num_recent: newest tokens by position, which stay whatever their score; at most kept_lens in
            a row that loses any.

    Returns:
        victims [B, U, V] int32: slots in ascending order, then -1.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; or invalid counts.
    """
    return _op(scores, positions, seq_lens, kept_lens, num_victims, num_recent)


def reference(scores, positions, seq_lens, kept_lens, num_victims, num_recent):
    slots = scores.shape[-1]
    count = (seq_lens - kept_lens).clamp(min=0)[:, None, None]  # [B, 1, 1]
    valid = torch.arange(slots, device=scores.device) < seq_lens[:, None, None]
    newest = positions.where(valid, -(2**31)).amax(-1, keepdim=True)
    recent = newest.long() - positions < num_recent  # in int32 the difference may overflow
    by_age = positions.argsort(dim=-1, stable=True)  # the oldest first
    ranking = scores.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = by_age.gather(-1, ranking.gather(-1, by_age).argsort(dim=-1, stable=True))
    tier = (recent.long() + 2 * ~valid).gather(-1, order)  # candidates, protected, nothing
    order = order.gather(-1, tier.argsort(dim=-1, stable=True))
    order = torch.nn.functional.pad(order, (0, max(num_victims - slots, 0)))[..., :num_victims]
    chosen = torch.arange(num_victims, device=scores.device) < count
    victims = order.where(chosen, slots).sort(-1).values
    return victims.where(victims < slots, -1).int()


def fake(scores, positions, seq_lens, kept_lens, num_victims, num_recent):
    return positions.new_empty((*scores.shape[:2], num_victims))


def native(extension: ModuleType, backend: int) -> Callable:
    def run(scores, positions, seq_lens, kept_lens, num_victims, num_recent):
        # A size that makes no sense reaches the native checks, which say so.
        victims = fake(scores, positions, seq_lens, kept_lens, max(num_victims, 0), num_recent)
        extension.select_victims(
            backend,
            scores,
            positions,
            seq_lens,
            kept_lens,
            victims,
            num_victims,
            num_recent,
            raw_stream(scores),
        )
        return victims

    return run


_op = bind(
    "select_victims",
    "(Tensor scores, Tensor positions, Tensor seq_lens, Tensor kept_lens, int num_victims,"
    " int num_recent) -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
