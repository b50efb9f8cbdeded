"""The prompts of a batch in one forward without padding, see `packing`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcomp.checks import require
from kvcomp.hf.cache import Cache
from kvcomp.hf.packing import Packing
from kvcomp.hf.rotation import changes_with_length
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.hf.wrapper import first_position

TYPES = {"token_type_ids", "mm_token_type_ids"}


def packs(run: Run) -> bool:
    """Whether prompts of the run's model can be packed: every layer with K and V is a method's, the
    model is told positions, and its mask does not depend on types of tokens (PaliGemma)."""
    if isinstance(run, StaticRun):
        return False
    cache: Any = run.new_cache()
    return (
        getattr(cache, "all_managed", False)
        and not cache.kv.layers[0].is_shared
        and "position_ids" in inspect.signature(run.decoder.forward).parameters
        and TYPES.isdisjoint(inspect.signature(run.model.forward).parameters)
        and not changes_with_length(run.model)
    )


@torch.no_grad()
def prefill(run: Run, prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
    """Encode prompts in one forward over all of their tokens.

    Args:
        prompts: ids of each, of any lengths.

    Returns:
        a cache whose rows are the prompts, as if padded on the left, and the logits [B, vocabulary]
        fp32 behind their last tokens.

    Raises:
        ValueError: an empty prompt, or a model whose prompts cannot be packed (see `packs`).
    """
    good = len(prompts) > 0 and all(len(prompt) > 0 for prompt in prompts)
    require(good, "kvcomp: prefill: prompts", "at least one, each of at least one token", prompts)
    known = packs(run)
    require(
        known, "kvcomp: prefill", "layers that all belong to a method", type(run.model).__name__
    )
    model = run.model
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)
    cache: Any = run.new_cache()
    cache.packing = Packing([len(prompt) for prompt in prompts], ids.device)
    places = [torch.arange(len(prompt), device=ids.device) for prompt in prompts]
    last = torch.tensor([last - 1 for _, last in cache.packing.spans], device=ids.device)
    keeps = model._supports_logits_to_keep()
    logits = model(
        input_ids=ids,
        position_ids=torch.cat(places)[None] + first_position(model),
        past_key_values=cache,
        use_cache=True,
        **({"logits_to_keep": last} if keeps else {}),
    ).logits[0]
    return cache, (logits if keeps else logits[last]).float()
