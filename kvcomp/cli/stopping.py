"""SIGTERM and SIGHUP, which end a process at once, as an exception: reports are still printed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(SystemExit):
    """Raised where a signal found the process; the exit code is the shell's, 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.exit_code = 128 + signum


INTERRUPTED = 128 + signal.SIGINT


def exit_code(error: BaseException) -> int:
    """Of a process that Ctrl-C or a signal ended."""
    return error.exit_code if isinstance(error, Stopped) else INTERRUPTED


def signals_raise() -> contextlib.AbstractContextManager[None]:
    """Within, SIGTERM and SIGHUP raise `Stopped`; one that is ignored (nohup) stays ignored."""
    return _handled(_raise, instead_of=signal.SIG_DFL)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, but SIGTERM and SIGHUP cancel the work, as Ctrl-C does, before they raise.

    An exception from a signal's handler would end whatever frame of the event loop it met.

    Raises:
        Stopped: one of them came, within `signals_raise`.
    """
    came: list[int] = []

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel(signum: int, frame: object) -> None:
            came.append(signum)
            loop.call_soon_threadsafe(task.cancel)

        with _handled(cancel, instead_of=_raise):
            return await work

    try:
        return asyncio.run(main())
    finally:
        if came:
            raise Stopped(came[0]) from None


def _raise(signum: int, frame: object) -> None:
    raise Stopped(signum)


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], instead_of: object) -> Iterator[None]:
    changed = []
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if (former := signal.getsignal(signum)) is instead_of:
                signal.signal(signum, handler)
                changed.append((signum, former))
    try:
        yield
    finally:
        for signum, former in changed:
            signal.signal(signum, former)
