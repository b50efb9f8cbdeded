"""segment_boundaries: when a segment of the output ends, and when a row must select again."""

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
    """One step of the rule that cuts a sequence into segments and releases the older ones.

    The tokens of a row are numbered from 0, and unit u of head h holds tokens [starts[u],
    starts[u + 1]). The open segment starts at starts[num_units] and ends before the newest token.
    All tokens from starts[num_indexed] on are local. For each row, in this order:

    * An open segment with tokens is closed if similarity < cut_below and it has at least `shortest`
      tokens, or if it has `longest` tokens. num_units grows by one, and the next segment starts
      with the newest token.
    * The row is triggered if similarity < retrieve_below, or if `local + longest` tokens are local.
      While more than `local` tokens are local, the oldest closed unit then stops being local:
      num_indexed grows.

    Args:
        similarity: [B] fp32; NaN is below no threshold.
        lengths: [B] int32, tokens of each row, the newest included.
        starts: [B, H, U + 1] int32, contiguous in the last dimension; the op reads head 0 and
            writes the end of a closed segment for all heads.
        num_units, num_indexed: [B] int32, num_indexed <= num_units < U; changed in place.
        cut_below, retrieve_below: thresholds on the similarity.
        shortest, longest: tokens of a segment, 1 <= shortest <= longest.
        local: tokens that stay local.

    Returns:
        closed [B] int32: the tokens of the segment that was closed, or 0; triggered [B] int32: 1 or
        0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; on the CPU also invalid counts,
            such as a row without a free unit.
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
