"""Reading given tokens through decode steps, as a model would decode them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcomp.cache import Report
from kvcomp.hf import patch
from kvcomp.methods import Method


@torch.no_grad()
def read(
    model: Any,
    method: Method,
    ids: Tensor,
    prompt: int,
    tick: Callable[[], None] = lambda: None,
    *,
    kv: str = "model",
    kv_rotate: bool | None = None,
) -> tuple[Tensor, Report]:
    """Feed ids [B, tokens] under `method`: the first `prompt` at once, the others one by one.

    Args:
        tick: called after each step.
        kv, kv_rotate: see `kvcomp.patch`.

    Returns:
        hidden states [B, tokens - prompt - 1, width] before the LM head, each of which predicts
        the token after the one that was fed, and the run's report.
    """
    decoder, hidden = model.get_decoder(), []
    with patch(model, method, kv=kv, kv_rotate=kv_rotate) as run:
        cache = run.new_cache()
        decoder(ids[:, :prompt], past_key_values=cache)
        for place in range(prompt, ids.shape[1] - 1):
            out = decoder(ids[:, place : place + 1], past_key_values=cache)
            hidden.append(out.last_hidden_state[:, -1])
            tick()
        return torch.stack(hidden, 1), run.report()
