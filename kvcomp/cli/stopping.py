"""SIGTERM and SIGHUP, which end a process at once, as an exception: reports are still printed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(SystemExit):
    """Raised where a signal found the process; the exit code is the shell's, 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.exit_code = 128 + signum


INTERRUPTED = 128 + signal.SIGINT


def exit_code(error: BaseException) -> int:
    """Of a process that Ctrl-C or a signal ended."""
    return error.exit_code if isinstance(error, Stopped) else INTERRUPTED


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise `Stopped`; one that is ignored (nohup) stays ignored."""

    def stop(signum: int, frame: object) -> None:
        raise Stopped(signum)

    changed = []
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is signal.SIG_DFL:
                signal.signal(signum, stop)
                changed.append(signum)
    try:
        yield
    finally:
        for signum in changed:
            signal.signal(signum, signal.SIG_DFL)
