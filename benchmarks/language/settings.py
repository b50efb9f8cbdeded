"""What all rows of a stored file have in common."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from harness.store import Row
from kvcomp.reading import Window, checksums


def settings(model: Any, options: Namespace, prompt: int, **more: Any) -> dict[str, Any]:
    """Of a part that reads `options.tokens` tokens, the first `prompt` of them at once."""
    return {
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": options.tokens,
        "prompt": prompt,
        "texts": checksums(),
        **more,
    }


def places(windows: Sequence[Window]) -> list[list[str | int]]:
    """Text and first token of each window."""
    return [[window.text, window.first] for window in windows]


def by_window(windows: Sequence[Window], figures: Sequence[Row]) -> list[Row]:
    """The figures of each window, with its place."""
    return [
        {"text": window.text, "first": window.first, **each}
        for window, each in zip(windows, figures, strict=True)
    ]
