"""Progress bars on standard error, whatever becomes of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def stderr_console() -> Console:
    """Standard error of this moment; a bar that it refuses is not worth an error."""
    from rich.console import Console

    return Console(file=cast("IO[str]", _Lenient(sys.stderr or open(os.devnull, "w"))))


def passing_bar(*columns: ProgressColumn, console: Console | None = None) -> Progress:
    """A progress bar that disappears at its end. There is none in a file or pipe, where it could
    not be taken back; rich would write an empty line."""
    from rich.progress import Progress

    console = console or stderr_console()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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


Tell = Callable[[int, bool], None]  # new tokens, and whether something is complete


@contextlib.contextmanager
def progress_bar(total: int, shown: bool, what: str) -> Iterator[Tell]:
    """A bar over `total` things, named `what`."""
    if not shown:
        yield lambda tokens, ended: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task("", total=total, tokens=0)

        def tell(tokens: int, ended: bool) -> None:
            known = bar.tasks[0].fields["tokens"]
            bar.update(task, advance=int(ended), tokens=known + tokens)

        yield tell
