"""Wrapper: a model that holds a text decoder beside towers for images or sound, used for text.

The forwards around the decoder's turn ids into embeddings, and some make the attention masks. This
one watches them: it keeps ids and padding for the decoder, and lets nothing but text through.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from kvcomp.hf.gate import Gate

# Arguments of a wrapper's forward, beyond those of its decoder, that come with text.
TEXT = {"labels", "logits_to_keep", "cache_position", "rope_deltas"}
KINDS = {"token_type_ids", "mm_token_type_ids"}  # 0 for a token of text


# What an outer forward makes of ids; positions may begin at 1, or count padding.
OUTER = {"inputs_embeds", "per_layer_inputs", "position_ids"}


class Wrapper(threading.local):
    """The outer forward that runs in this thread, if the model has any.

    Args:
        model: which holds the decoder, or is it.
        decoder: the module that runs the layers.

    Attributes:
        modules: what lies around the decoder, outermost first; none in a model of text alone.
        ids, mask: [B, n] and [B, tokens] that the running forward was given; None: none.
        running: whether one runs, and has not reached the decoder yet.
    """

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        self.name = type(model).__name__
        self.modules = _around(model, decoder)
        self.embed: Callable[[Tensor], Tensor] | None = None
        if self.modules:
            self.embed = decoder.get_input_embeddings()
        self.known = TEXT | set(inspect.signature(decoder.forward).parameters)
        self._leave()

    def _leave(self) -> None:
        self.running = False
        self.ids: Tensor | None = None
        self.mask: Any = None
        self.masks: list[Any] = []  # that the outer forward has made

    def watched(self, forward: Callable, gate: Gate) -> Callable:
        """An outer forward with what is done around it."""
        names = inspect.signature(forward).parameters

        @wraps(forward)
        def outer(*args: Any, **given: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | given
            if torch.compiler.is_compiling():
                return forward(**given)
            with gate.forward() as goes_on:
                if self.running or not goes_on:
                    return forward(**given)
                self._enter(given)
                try:
                    return forward(**given)
                finally:
                    self._leave()

        return outer

    def _enter(self, given: dict) -> None:
        self.ids = given.get("input_ids")
        self.mask = one_of(given.get("attention_mask"))
        for name, value in given.items():
            if name in self.known or not _tensors(value):
                continue
            if name in KINDS and (value.shape[-1] == 1 or not bool(value.any())):
                continue
            raise ValueError(
                f"kvcomp: {name}: {self.name} decodes text alone while it is patched, no images,"
                " video or sound; undo() the run for them"
            )
        self.running = True

    def makes(self, mask: Callable[[], Any], columns: int) -> Any:
        """In place of a mask that the outer forward makes, for `columns` new tokens: a decode step
        has no use for one."""
        if columns == 1:
            return None
        self.masks.append(made := mask())
        return made

    def decode(self, given: dict) -> dict:
        """The arguments of a decoder with a cache: with the padding that the outer forward was
        given, in place of the masks that it has made. From here on, masks are the decoder's own."""
        outer, self.running = self.running, False
        return given | {
            "attention_mask": self.mask if outer else one_of(given.get("attention_mask"))
        }

    def check(self, masks: list[Any]) -> None:
        """Raise ValueError where a mask of the outer forward is none that the decoder has made."""
        for mask in self.masks:
            if not any(_equal(mask, own) for own in masks):
                raise ValueError(
                    f"kvcomp: {self.name} makes an attention mask of its own for text, which says"
                    " more than padding: unsupported"
                )

    def ids_of(self, given: dict) -> Tensor | None:
        """[B, n] of the decoder's arguments, or of the embeddings among them."""
        ids: Tensor | None = given.get("input_ids")
        return self.ids if ids is None else ids

    def with_ids(self, given: dict) -> dict:
        """The decoder's arguments, with ids in place of their embeddings.

        Raises:
            ValueError: the outer forward has done something else with the ids.
        """
        embeddings, ids = given.get("inputs_embeds"), self.ids
        if ids is None or embeddings is None:
            return given
        assert self.embed is not None, "there is an outer forward"
        if ids.shape[1] > 1 and not torch.equal(self.embed(ids), embeddings):
            raise ValueError(
                f"kvcomp: {self.name} makes embeddings of its own: delethink encodes tokens again"
                " from their ids"
            )
        rest = {name: x for name, x in given.items() if name not in OUTER}
        return rest | {"input_ids": ids}


def first_position(model: Any) -> int:
    """The position that `generate` gives the first token of a text: 0, or 1 in PaliGemma."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    given = {"position_ids": zero, "attention_mask": torch.ones_like(zero)}
    told = model.prepare_inputs_for_generation(zero, **given).get("position_ids")
    return 0 if told is None else int(told.flatten()[0])


def one_of(mask: Any) -> Any:
    """A mask, where there is one for each kind of layer, and `StaticRun` has made them."""
    return next(iter(mask.values())) if isinstance(mask, dict) else mask


def _around(model: PreTrainedModel, decoder: Module) -> list[Any]:
    if model.config is model.config.get_text_config(decoder=True):
        return []
    path = next(name for name, module in model.named_modules() if module is decoder).split(".")
    return [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]


def _tensors(value: Any) -> bool:
    """Whether a value is a tensor, or holds one."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(map(_tensors, value))
    )


def _equal(mask: Any, other: Any) -> bool:
    if not isinstance(mask, Tensor) or not isinstance(other, Tensor):
        return mask is other
    return mask is other or torch.equal(mask, other)
