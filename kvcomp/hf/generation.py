"""Generation: what a patched model's `generate` calls of its run.

It gets the run's cache, may continue it in a further turn, and drops its drafts where it is
interrupted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import Cache as TransformersCache

from kvcomp.cache import Meter
from kvcomp.hf.cache import Cache
from kvcomp.hf.drafting import Drafts, refuse_assistants, refuse_itself, refuse_processors
from kvcomp.hf.refusals import refuse_misplaced, refuse_prefixes
from kvcomp.hf.turns import Turns

if TYPE_CHECKING:
    from kvcomp.hf.chunked_cache import ChunkedCache


class Generation(Turns):
    """The part of a run that stands behind `generate`.

    Attributes:
        cache_class: of the caches that the user holds.
        model: the patched model.
        meter: counts over all caches of this run.
    """

    cache_class: ClassVar[type[Cache | ChunkedCache]] = Cache
    model: Any
    meter: Meter
    _running: threading.local

    def new_cache(self) -> TransformersCache:
        raise NotImplementedError

    def _replace(self, module: Module, name: str, function: Callable) -> None:
        raise NotImplementedError

    def _enter_generate(self) -> None:
        """Replace what `generate` calls, until the run is undone."""
        model = self.model
        self._replace(model, "generate", self._generating(model.generate))
        self._replace(model, "_prepare_cache_for_generation", self._prepare_cache)
        prepare = model.prepare_inputs_for_generation
        ours = wraps(prepare)(partial(self._prepare_inputs, prepare))
        self._replace(model, "prepare_inputs_for_generation", ours)
        self._logits_processor = model._get_logits_processor
        candidates = partial(self._candidates, model._get_candidate_generator)
        self._replace(model, "_get_candidate_generator", candidates)
        self._replace(model, "_get_logits_processor", self._begin_generation)

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict, mode: Any, *args: Any
    ) -> None:
        """Replaces the model's own, so that `generate` gets kvcomp's cache."""
        refuse_prefixes(self.model)
        if generation_config.use_cache is False:
            raise ValueError("kvcomp: generate(use_cache=False): a method needs its cache")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "kvcomp: generate(cache_implementation="
                f"{generation_config.cache_implementation!r}): the patched model uses its own cache"
            )
        if "assisted" in str(mode).lower():
            refuse_assistants(self.method)
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()
        self._check_cache(model_kwargs["past_key_values"])
        model_kwargs["past_key_values"].drop_drafts()
        self._running.generates = weakref.ref(model_kwargs["past_key_values"])

    def _generating(self, generate: Callable) -> Callable:
        """The model's `generate`, which drops its drafts where it is interrupted or fails."""

        @wraps(generate)
        def generating(*args: Any, **given: Any) -> Any:
            refuse_misplaced(given.get("custom_generate"), given.get("logits_processor"))
            outer = getattr(self._running, "generates", None)  # it runs within that `generate`
            self._running.generates = lambda: None
            try:
                return generate(*args, **given)
            except BaseException:
                if (cache := self._running.generates()) is not None:
                    cache.drop_drafts()
                raise
            finally:
                self._running.generates = outer

        return generating

    def _candidates(self, make: Callable, *args: Any, **given: Any) -> Drafts:
        """In place of the model's own `_get_candidate_generator`."""
        config, assistant = given["generation_config"], given.get("assistant_model")
        refuse_itself(self.model, assistant, config.assistant_early_exit, self.method)
        refuse_processors(given["logits_processor"])
        return Drafts(make(*args, **given), given["model_kwargs"]["past_key_values"])

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, self.cache_class) or cache.meter is not self.meter:
            raise ValueError(
                "kvcomp: past_key_values: expected a cache of this run (run.new_cache(), or the one"
                f" that generate returned), got {type(cache).__name__}"
            )

    def _prepare_inputs(self, prepare: Callable, input_ids: Tensor, **given: Any) -> dict:
        """Replaces the model's own. Some models (Phi-3 with longrope) drop the cache where their
        rotary frequencies change and encode everything again; kvcomp's cache is then reset.
        Assisted decoding hands in all of the text in a further turn; only its end is new."""
        cache = given.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        told = ("next_sequence_length", "inputs_embeds")
        if (
            seen
            and given.get("is_first_iteration")
            and not any(given.get(x) is not None for x in told)
        ):
            given["next_sequence_length"] = max(input_ids.shape[1] - seen, 0) or None
        inputs = prepare(input_ids, **given)
        if cache is not None and inputs.get("past_key_values") is None:
            self._check_cache(cache)
            cache.begin_anew()
            inputs["past_key_values"] = cache
        return inputs
