"""Real texts that every Python has, and windows of them.

reference: the reference manual's topics (`pydoc_data`), English prose with some code.
source: modules of the standard library, code with some prose.

They change a little with Python's version, so results carry a checksum of each.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SOURCES = (
    *("argparse", "ast", "collections", "dataclasses", "datetime", "difflib", "inspect"),
    *("optparse", "pathlib", "statistics", "subprocess", "tarfile", "typing", "zipfile"),
)


def reference() -> str:
    topics = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[key] for key in sorted(topics))


def source() -> str:
    return "\n\n".join(inspect.getsource(import_module(name)) for name in SOURCES)


TEXTS: dict[str, Callable[[], str]] = {"reference": reference, "source": source}


@dataclass(frozen=True)
class Window:
    """A run of tokens of a text. Those that the tokenizer puts before every text stand in the
    place of the first ones.

    Attributes:
        first: the place in the text where it begins.
    """

    text: str
    first: int
    ids: tuple[int, ...]


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text, if any: without its own, Gemma 3 270M
    loses 1.3 nats per token more. One that it puts behind a text does not count."""
    found = tuple(tokenizer("")["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    ends = end is not None and found[-1:] == (end,) and end != tokenizer.bos_token_id
    return found[:-1] if ends else found


def windows(
    tokenizer: Any, count: int, tokens: int, *, offset: int = 0, texts: Sequence[str] = tuple(TEXTS)
) -> list[Window]:
    """`count` windows of `tokens` tokens, spread evenly over the texts, text by text in turn.

    Args:
        offset: number of tokens by which all windows are moved, to get windows unlike the tests'.

    Raises:
        ValueError: the texts are too short for so many.
    """
    found = []
    start = opening(tokenizer)
    each = -(-count // len(texts))
    for name in texts:
        ids = tokenizer(TEXTS[name](), add_special_tokens=False, verbose=False)["input_ids"]
        stride = (len(ids) - tokens) // each
        if stride < tokens + offset:
            raise ValueError(
                f"kvcomp.reading: {name} has {len(ids)} tokens, too few for {each} windows of"
                f" {tokens}"
            )
        begins = [offset + place * stride for place in range(each)]
        found.append(
            [
                Window(name, first, start + tuple(ids[first + len(start) : first + tokens]))
                for first in begins
            ]
        )
    return [window for group in zip(*found, strict=True) for window in group][:count]


def checksums() -> dict[str, str]:
    """Of each text."""
    return {name: hashlib.sha256(make().encode()).hexdigest()[:16] for name, make in TEXTS.items()}
