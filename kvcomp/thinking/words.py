"""Tokens by their text: the tag that ends a thought, words in all spellings, ends of paragraphs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

TAGS = ("</think>", "[/THINK]", "</thinking>", "</thought>", "</reasoning>")
TAIL = 4  # tokens whose text is looked at for an end


def end_of_thinking(tokenizer: Any, tag: str | None = None, *, caller: str = "thinking") -> int:
    """The id of the token that ends a thought.

    Args:
        tag: its text; None: the one of `TAGS` that the chat template names, or the vocabulary has.

    Raises:
        ValueError: the model has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    if tag is None:
        template = str(getattr(tokenizer, "chat_template", None) or "")
        known = [each for each in TAGS if each in vocabulary]
        tag = next((each for each in known if each in template), known[0] if known else None)
        if tag is None:
            raise ValueError(
                f"kvcomp.thinking: {caller}: expected a model that marks its thoughts with one of"
                f" {', '.join(TAGS)}, got a tokenizer without any; pass end=TEXT (--with"
                " NAME.end=TEXT), a token that ends its thoughts"
            )
    return one_token(tokenizer, tag, "end", caller)


def one_token(tokenizer: Any, text: str, argument: str, caller: str) -> int:
    """The id of a text that is one token.

    Raises:
        ValueError: it is none, or several.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"kvcomp.thinking: {caller}: {argument}: expected a text, got {text!r}")
    index = tokenizer.get_vocab().get(text)
    if index is None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        is_known = len(ids) == 1 and tokenizer.decode(ids).strip() == text.strip()
        index = ids[0] if is_known else None
    if index is None:
        raise ValueError(
            f"kvcomp.thinking: {caller}: {argument}: expected a text that is one token of this"
            f" model, got {text!r}"
        )
    return int(index)


def tokens_of(tokenizer: Any, text: str, argument: str, caller: str) -> list[int]:
    """The ids of a text that is put into a thought.

    Raises:
        ValueError: it has none, or the model does not know all of it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else []
    if not ids or not text.strip() or getattr(tokenizer, "unk_token_id", None) in ids:
        raise ValueError(
            f"kvcomp.thinking: {caller}: {argument}: expected a text of tokens of this model, got"
            f" {text!r}"
        )
    return list(ids)


def spellings(tokenizer: Any, words: Collection[str], *, caller: str = "thinking") -> list[int]:
    """Ids of all tokens that are one of the words, in any case, with or without blanks.

    Raises:
        ValueError: no token is.
    """
    wanted = {word.strip().casefold() for word in words}
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    found = [index for index, text in enumerate(texts) if text.strip().casefold() in wanted]
    if not found:
        raise ValueError(
            f"kvcomp.thinking: {caller}: words: expected some that are tokens of this model, got"
            f" {', '.join(words)}"
        )
    return found


def ends_with(tokenizer: Any, ids: Tensor, ends: Collection[str]) -> list[bool]:
    """Whether the text of each row of ids [B, n] ends in one of `ends`. The text is looked at, as
    many tokens end a paragraph or sentence; a full stop behind a digit may be a decimal point."""
    texts = tokenizer.batch_decode(ids[:, -TAIL:].tolist())
    return [
        text.endswith(tuple(ends)) and not (text.endswith(".") and text[-2:-1].isdigit())
        for text in texts
    ]


def has(ids: Tensor, token: int) -> Tensor:
    """[B] bool: which rows of ids [B, n] have the token."""
    return (ids == token).any(1)
