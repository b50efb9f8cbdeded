"""The console of progress bars: standard error, whatever becomes of it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console


def stderr_console() -> Console:
    """Standard error of this moment; a bar that it refuses is not worth an error."""
    from rich.console import Console

    return Console(file=cast("IO[str]", _Lenient(sys.stderr or open(os.devnull, "w"))))


class _Lenient:
    """A stream whose write errors are dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
