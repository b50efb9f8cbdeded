"""Assisted decoding of `generate`, prompt lookup included: its candidates are drafts of our cache.

transformers appends the candidates to the cache and takes those back that the model would not have
chosen. Here they are staged, and `crop`, which ends each round, commits the rest: nothing is taken
back, so methods that evict or retrieve can be assisted too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from kvcomp.methods import Method

if TYPE_CHECKING:
    from kvcomp.hf.cache import Cache
    from kvcomp.hf.chunked_cache import ChunkedCache


def refuse_assistants(method: Method) -> None:
    """Raise ValueError, with the reason, where drafts cannot be checked under `method`."""
    if (reason := method.drafts_refused) is not None:
        raise ValueError(
            f"kvcomp: assisted decoding checks several tokens at once, which {method.name} cannot"
            f" do: {reason}"
        )


def refuse_processors(processors: Any) -> None:
    """Raise ValueError for logits processors that remember the steps before: they would take drafts
    for steps that were made, also those that are dropped."""
    stock = SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
    for each in processors or ():
        if isinstance(each, stock) or getattr(each, "stepwise", False):
            raise ValueError(
                f"kvcomp: generate: logits_processor: expected functions of the tokens alone where"
                f" several are checked at once, got {type(each).__name__}, which remembers each"
                " step"
            )


def refuse_itself(model: Any, assistant: Any, early_exit: int | None, method: Method) -> None:
    """Raise ValueError where the patched model would write its own drafts, in a cache of the
    method's from which transformers takes tokens back."""
    if early_exit is not None:
        raise ValueError(
            "kvcomp: generate(assistant_early_exit=...): the patched model would fill caches of"
            " fewer layers than it has; use an assistant or prompt lookup"
        )
    if assistant is model and not method.croppable:
        raise ValueError(
            f"kvcomp: generate(assistant_model=...): the patched model itself decodes with"
            f" {method.name}, which cannot take tokens back: {method.one_way}; expected another"
            " model"
        )


class Drafts:
    """A candidate generator of transformers' whose candidates go into the cache as drafts.

    None go in beside the prompt, and never more than the cache has room for.
    """

    def __init__(self, generator: Any, cache: Cache | ChunkedCache) -> None:
        self._generator, self._cache = generator, cache
        self._began = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def get_candidates(self, input_ids: Tensor, **given: Any) -> tuple[Tensor, Tensor | None]:
        """As transformers': [1, tokens + candidates] ids, and their logits or None."""
        room = self._cache.room - 1 if self._began else 0
        self._began = True
        ids, logits = self._generator.get_candidates(input_ids, **given)
        seen = input_ids.shape[1]
        proposed = ids.shape[1] - seen
        kept = int(min(proposed, room))
        if kept < proposed:
            ids = ids[:, : seen + kept]
            logits = None if logits is None or not kept else logits[:, :kept]
            if probs := getattr(self._generator, "probs", None):  # of candidates nobody will judge
                del probs[len(probs) - (proposed - kept) :]
        if kept > 0:
            self._cache.stage()
        return ids, logits
