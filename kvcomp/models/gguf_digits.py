"""Digits that are tokens of their own, which transformers does not read from a GGUF file."""

from __future__ import annotations

from typing import Any

# Of tokenizer.ggml.pre: single digits first, and what lies between them as in GPT-2.
DIGITS_FIRST = {"codeshell", "command-r", "exaone", "refact", "smollm", "starcoder"}


def split(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Split text as the vocabulary of a GGUF file was made, where GPT-2's way took its place.

    transformers splits as GPT-2 does for every name that it does not know, so spaces before a
    number become other tokens, and a number may become one token.

    Args:
        tokenizer: as transformers reads it from the file; changed in place.
        fields: those of the file, as gguf's reader has them.
    """
    from tokenizers import pre_tokenizers

    name = fields.get("tokenizer.ggml.pre")
    own = tokenizer.backend_tokenizer
    if name is None or name.contents() not in DIGITS_FIRST:
        return
    if not isinstance(own.pre_tokenizer, pre_tokenizers.ByteLevel):  # it knew the name
        return
    digits = pre_tokenizers.Digits(individual_digits=True)
    own.pre_tokenizer = pre_tokenizers.Sequence([digits, own.pre_tokenizer])
