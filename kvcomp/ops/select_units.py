"""select_units: select the best units of tokens within a budget."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def select_units(
    scores: Tensor, starts: Tensor, num_indexed: Tensor, active: Tensor, budget: int
) -> Tensor:
    """List the tokens of the best units, `budget` tokens in total.

    Units may have any size: unit u holds rows [starts[u], starts[u + 1]). They are taken in the
    order of falling score, the earlier unit first at equal scores, NaN last. The unit that exceeds
    the budget contributes its first tokens.

    Args:
        scores: [B, H, U] fp32, contiguous in the last dimension.
        starts: [B, H, U + 1] int32, ascending, contiguous in the last dimension.
        num_indexed: [B] int32, at most U; later units are ignored.
        active: [B] int32, 0 for rows to leave out.
        budget: K, the number of tokens.

    Returns:
        rows [B, H, K] int32, ascending, then -1; all -1 in a row that is not active.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; a budget below 1; on the CPU
            also invalid counts, and starts that descend or are negative.

    Source: LouisKV (arXiv 2510.11292), its selection within a budget.
    """
    return _op(scores, starts, num_indexed, active, budget)


def reference(scores, starts, num_indexed, active, budget):
    batch, heads, units = scores.shape
    exists = torch.arange(units, device=scores.device) < num_indexed[:, None, None]
    exists = exists & (active != 0)[:, None, None]
    sizes = (starts[..., 1:] - starts[..., :-1]).masked_fill(~exists, 0).long()  # [B, H, U]
    ranking = scores.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = ranking.masked_fill(~exists, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # A stable sort would let an absent unit precede one whose score is -inf; their size is 0.
    before = sizes.gather(-1, order).cumsum(-1) - sizes.gather(-1, order)
    taken = torch.zeros_like(sizes).scatter(
        -1, order, (budget - before).clamp(min=0).minimum(sizes.gather(-1, order))
    )
    total = taken.cumsum(-1)
    place = torch.arange(budget, device=scores.device).expand(batch, heads, -1).contiguous()
    unit = torch.searchsorted(total, place, right=True)
    exists = unit < units
    unit = unit.clamp(max=units - 1)
    first = (total - taken).gather(-1, unit)
    rows = starts[..., :-1].gather(-1, unit) + place - first
    return rows.where(exists, -1).int()


def fake(scores, starts, num_indexed, active, budget):
    return starts.new_empty(*scores.shape[:2], budget)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(scores, starts, num_indexed, active, budget):
        # A size that makes no sense reaches the native checks, which say so.
        rows = fake(scores, starts, num_indexed, active, max(budget, 0))
        extension.select_units(
            backend, scores, starts, num_indexed, active, rows, budget, raw_stream(scores)
        )
        return rows

    return run


_op = bind(
    "select_units",
    "(Tensor scores, Tensor starts, Tensor num_indexed, Tensor active, int budget) -> Tensor",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
