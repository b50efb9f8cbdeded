"""recurrence_update: the last hit of each token and its longest interval between hits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream

MAX_STEPS = 32  # hit bits of that many steps are replayed at once


def recurrence_update(
    hits: Tensor,
    last_hit: Tensor,
    longest: Tensor,
    seq_lens: Tensor,
    born: Tensor,
    first_step: int,
) -> None:
    """Update each token's last hit and longest interval with the hits of up to 32 steps, in order.

    For a token hit at step t, `longest = max(longest, t - last_hit)` and then `last_hit = t`, as in
    LazyEviction (arXiv 2506.15969). A token that arrives at step s starts with `last_hit = s - 1`
    and `longest = 0`. The tokens of a row are in the order of their arrival, one per step up to the
    last step of `hits`. Further new tokens (a prompt) count as arrived at the first step.

    Args:
        hits: [B, R, U, W] int32 bits of R <= 32 steps, from `attention_hits`; strided over B, R.
        last_hit: [B, U, N] int32, updated in place; slots past the end of a row are not touched.
        longest: [B, U, N] int32, updated in place: the longest interval between two hits.
        seq_lens: [B] int32, tokens in each row after the last of the steps, at most N.
        born: [B] int32, the number of last slots of a row that are new since the last update.
        first_step: the step number of `hits[:, 0]`, at least 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; more than 32 steps.
    """
    _op(hits, last_hit, longest, seq_lens, born, first_step)


def reference(hits, last_hit, longest, seq_lens, born, first_step):
    num_steps, slots = hits.shape[1], last_hit.shape[2]
    slot = torch.arange(slots, device=hits.device)
    age = seq_lens[:, None, None] - slot  # [B, 1, N], the newest is 1
    new = (age >= 1) & (age <= born[:, None, None])
    birth = first_step + (num_steps - age).clamp(min=0)
    last = torch.where(new, birth - 1, last_hit)
    interval = torch.where(new, 0, longest)
    for row in range(num_steps):
        step = first_step + row
        hit = (hits[:, row, :, slot // 32] >> (slot % 32) & 1).bool()  # [B, U, N]
        interval = torch.where(hit, torch.maximum(interval, step - last), interval)
        last = torch.where(hit, step, last)
    last_hit.copy_(torch.where(age >= 1, last, last_hit))
    longest.copy_(torch.where(age >= 1, interval, longest))


def fake(hits, last_hit, longest, seq_lens, born, first_step):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(hits, last_hit, longest, seq_lens, born, first_step):
        extension.recurrence_update(
            backend, hits, last_hit, longest, seq_lens, born, first_step, raw_stream(hits)
        )

    return run


_op = bind(
    "recurrence_update",
    "(Tensor hits, Tensor(a!) last_hit, Tensor(b!) longest, Tensor seq_lens, Tensor born,"
    " int first_step) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
)
