"""Where output goes: standard output, standard error and files, any of which may refuse it.

A place that refuses is one line and exit code 2, and costs no other output: what can still be
shown or written is. A reader that has seen enough (`| head -1`) is not an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rich.console import Console

PIPE_CLOSED = 141  # exit code of a program that SIGPIPE ends, 128 + 13


class Refused(ValueError):
    """Output that a place did not take.

    Attributes:
        code: exit code, 2, or 141 where all that happened is that the reader of a pipe left.
    """

    def __init__(self, place: str, error: Exception) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        super().__init__(f"kvcomp: cannot write {place}: {reason}")
        self.code = PIPE_CLOSED if isinstance(error, BrokenPipeError) else 2


def say(text: object, end: str = "\n") -> None:
    """Print to standard output, now and not when the buffer is full."""
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError) as error:  # ValueError: a stream that is closed already
        raise Refused("standard output", error) from error


def say_aside(text: object) -> None:
    """Print to standard error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError) as error:
        raise Refused("standard error", error) from error


def show(*parts: object) -> None:
    """Print lines and rich tables to standard output; a line is not folded."""
    console = _Console(width=None if sys.stdout.isatty() else 120)  # rich would assume 80 columns
    try:
        for part in parts:
            console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    except OSError as error:
        raise Refused("standard output", error) from error


class _Console(Console):
    def on_broken_pipe(self) -> None:  # called within the except clause; rich would exit with 1
        raise


def write(file: Path | None, data: str | bytes) -> None:
    """Write a file that was asked for; half a file is not left behind."""
    if file is None:
        return
    is_new = not os.path.lexists(file)
    try:
        file.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        if is_new:
            file.unlink(missing_ok=True)
        raise Refused(repr(str(file)), error) from error


def check_output(file: Path | None) -> None:
    """Find out before minutes of work whether `file` can be written; it stays as it is.

    Raises:
        ValueError: it cannot, and why.
    """
    if file is None:
        return
    is_new = not os.path.lexists(file)
    if not is_new and not os.path.isfile(file) and not os.path.isdir(file):
        return  # a pipe or a device: to open one may have effects
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
    except OSError as error:
        raise Refused(repr(str(file)), error) from error
    if is_new:
        file.unlink()


def check_distinct(**files: Path | None) -> None:
    """Refuse one file for two purposes; files by the names of their options."""
    seen: dict[str, str] = {}
    for option, file in files.items():
        if file is None or (os.path.exists(file) and not os.path.isfile(file)):
            continue
        other = seen.setdefault(os.path.realpath(file), option)
        if other != option:
            raise ValueError(
                f"kvcomp: --{option}: expected another file than --{other}, got {str(file)!r}"
            )


def deliver(*steps: Callable[[], None]) -> None:
    """Run all steps, even if some are refused, and then raise one error for the refused ones."""
    refused = []
    for step in steps:
        try:
            step()
        except Refused as error:
            refused.append(error)
    if refused:
        raise max(refused, key=lambda error: error.code == 2)


def silence(*streams: IO[Any]) -> None:
    """Keep Python from complaining at exit about output that a stream refused."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
