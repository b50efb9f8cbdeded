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

SOURCES: tuple[str, ...]
SOURCES = (
    "argparse",
    "ast",
    "collections",
    "dataclasses",
    "datetime",
    "difflib",
    "inspect",
)
SOURCES += ("optparse", "pathlib", "statistics", "subprocess", "tarfile", "typing", "zipfile")


def reference() -> str:
    topics = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[key] for key in sorted(topics))


def source() -> str:
    return "\n\n".join(inspect.getsource(import_module(name)) for name in SOURCES)


TEXTS: dict[str, Callable[[], str]] = {"reference": reference, "source": source}


@dataclass(frozen=True)
class Window:
    """A run of tokens of a text.

    Attributes:
        first: the place of its first token in the text.
    """

    text: str
    first: int
    ids: tuple[int, ...]


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
        found.append([Window(name, first, tuple(ids[first : first + tokens])) for first in begins])
    return [window for group in zip(*found, strict=True) for window in group][:count]


def checksums() -> dict[str, str]:
    """Of each text."""
    return {name: hashlib.sha256(make().encode()).hexdigest()[:16] for name, make in TEXTS.items()}
