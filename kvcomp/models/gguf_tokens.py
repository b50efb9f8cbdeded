"""Special tokens of a GGUF file that transformers does not find in it."""

from __future__ import annotations

import json
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def restore(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Give the special tokens of a GGUF file the ids that they have there.

    In a byte-level vocabulary transformers takes a token such as DeepSeek's <｜User｜>, which is
    not in GPT-2's byte alphabet, for text: it is cut into bytes, or gets an id for which the
    model has no row.

    Args:
        tokenizer: as transformers reads it from the file; changed in place.
        fields: those of the file, as gguf's reader has them.
    """
    from tokenizers import Tokenizer

    if "tokenizer.ggml.token_type" not in fields:
        return
    if fields["tokenizer.ggml.model"].contents() != "gpt2":
        return
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    found = {token["id"]: token for token in state["added_tokens"] if token["id"] < len(tokens)}
    lost = {
        place: token
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED) and place not in found
    }
    if not lost:
        return
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {lost.get(place, word): place for word, place in vocabulary.items()}
    matching = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for place, token in lost.items():
        special = kinds[place] == CONTROL
        found[place] = {"id": place, "content": token, "special": special} | matching
    state["added_tokens"] = [found[place] for place in sorted(found)]
    _renumber(state.get("post_processor"), {token: place for place, token in lost.items()})
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _renumber(processor: dict[str, Any] | None, places: dict[str, int]) -> None:
    """The ids of tokens that are put before or behind every text."""
    if processor is None:
        return
    for step in processor.get("processors", ()):
        _renumber(step, places)
    tokens = processor.get("special_tokens", {})
    for token in tokens.keys() & places.keys():
        tokens[token]["ids"] = [places[token]]
