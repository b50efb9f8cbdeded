"""The first and the newest tokens of a request, in whole blocks of the engine's."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv

from kvcomp.engines.vllm.settings import SinkWindow


def kept_pages(
    table: Tensor, lens: Tensor, page: int, block: int, method: SinkWindow
) -> tuple[Tensor, Tensor]:
    """What a decode row attends to: page ids [B, K] int32, and their tokens [B] int32.

    Args:
        table: [B, pages] int32.
        lens: [B] int32, the new token included, which has not been processed yet.
        page, block: tokens in a page of the table, and in a block of the engine's.
    """
    window = method.budget - method.sinks
    column = torch.arange(table.shape[1])
    sinks = cdiv(method.sinks, block) * block // page
    newest = (lens.long() - 1 - window).clamp(min=0) // block * block // page
    used = (lens.long() + page - 1) // page
    kept = (column < used[:, None]) & ((column < sinks) | (column >= newest[:, None]))
    count = kept.sum(1)
    order = kept.logical_not().int().argsort(dim=1, stable=True)[:, : int(count.max())]
    ids = torch.where(torch.arange(order.shape[1]) < count[:, None], table.gather(1, order), -1)
    return ids, (lens - (used - count) * page).int()
