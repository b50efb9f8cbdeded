"""select_victims: the tokens that leave a cache, by score, the newest ones protected."""

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
    """The `seq_lens - kept_lens` lowest-scored tokens of every row and unit.

    Ties go against the older token, so that equal scores degrade to a sliding window; NaN counts as
    the lowest score. Where slots lie does not matter: a permutation of the slots permutes the
    victims.

    Args:
        scores: [B, U, N] fp32, higher is kept; rows may be strided. U units, each with its own set.
        positions: [B, U, N] int32, distinct within a unit's valid slots; rows may be strided.
        seq_lens: [B] int32, valid tokens of each row, at most N.
        kept_lens: [B] int32, tokens that stay; a row that is no longer loses none.
        num_victims: V, room for the victims of the row that loses most.
        num_recent: newest tokens by position that stay whatever their score; at most kept_lens
            where a row loses any.

    Returns:
        victims [B, U, V] int32: slots, ascending, then -1.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; counts that do not fit.
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
