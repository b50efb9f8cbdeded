"""segment_boundaries: where a sequence is cut, and when what is resident must be chosen anew."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def segment_boundaries(
    similarity: Tensor,
    lengths: Tensor,
    starts: Tensor,
    num_units: Tensor,
    num_indexed: Tensor,
    *,
    cut_below: float,
    retrieve_below: float,
    shortest: int,
    longest: int,
    local: int,
) -> tuple[Tensor, Tensor]:
    """One step of the rule that cuts a sequence into segments and lets older ones go.

    A row's tokens are numbered; unit u of head h holds tokens [starts[u], starts[u + 1]). The
    tokens from starts[num_units] up to the newest, which is not counted, form the open segment; all
    from starts[num_indexed] on are local. For each row, in this order:

    * the open segment, if it has tokens, is closed where similarity < cut_below and it has at
      least `shortest`, or where it has `longest`: num_units grows by one, and the next segment
      starts with the newest token;
    * the row is triggered where similarity < retrieve_below, or where `local + longest` tokens are
      local. Then the oldest closed units stop being local, one by one while more than `local`
      tokens are: num_indexed grows.

    Args:
        similarity: [B] fp32; NaN is below nothing.
        lengths: [B] int32, tokens of each row, the newest among them.
        starts: [B, H, U + 1] int32, contiguous in the last dimension; a closed segment's end is
            written for all heads. What is read is head 0's.
        num_units, num_indexed: [B] int32, num_indexed <= num_units < U; changed in place.
        cut_below, retrieve_below: thresholds on the similarity.
        shortest, longest: tokens of a segment, 1 <= shortest <= longest.
        local: tokens that stay local.

    Returns:
        closed [B] int32: tokens of the segment that was closed, or 0; triggered [B] int32: 1 or 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also counts that do
            not fit, among them a row that has no unit left.
    """
    return _op(
        similarity,
        lengths,
        starts,
        num_units,
        num_indexed,
        cut_below,
        retrieve_below,
        shortest,
        longest,
        local,
    )


def reference(
    similarity,
    lengths,
    starts,
    num_units,
    num_indexed,
    cut_below,
    retrieve_below,
    shortest,
    longest,
    local,
):
    closed, triggered = torch.zeros_like(lengths), torch.zeros_like(lengths)
    for row in range(len(lengths)):
        newest, units, indexed = (
            int(x[row]) - y for x, y in ((lengths, 1), (num_units, 0), (num_indexed, 0))
        )
        bounds = starts[row, 0].tolist()
        count = newest - bounds[units]
        turned = bool(similarity[row] < cut_below)
        if count > 0 and ((turned and count >= shortest) or count >= longest):
            units += 1
            starts[row, :, units] = bounds[units] = newest
            closed[row] = count
        if similarity[row] < retrieve_below or newest - bounds[indexed] >= local + longest:
            triggered[row] = 1
            while indexed < units and newest - bounds[indexed] > local:
                indexed += 1
        num_units[row], num_indexed[row] = units, indexed
    return closed, triggered


def fake(similarity, lengths, *_):
    return torch.empty_like(lengths), torch.empty_like(lengths)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(similarity, lengths, starts, num_units, num_indexed, *numbers):
        closed, triggered = fake(similarity, lengths)
        extension.segment_boundaries(
            backend,
            similarity,
            lengths,
            starts,
            num_units,
            num_indexed,
            closed,
            triggered,
            *numbers,
            raw_stream(lengths),
        )
        return closed, triggered

    return run


_op = bind(
    "segment_boundaries",
    "(Tensor similarity, Tensor lengths, Tensor(a!) starts, Tensor(b!) num_units,"
    " Tensor(c!) num_indexed, float cut_below, float retrieve_below, int shortest, int longest,"
    " int local) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
