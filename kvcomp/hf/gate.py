"""Gate: counts the running forwards of a model, so that closing it can wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Prevents a run from ending in the middle of a forward.

    A thread is inside from the start of its outermost forward to its end. `close` waits until no
    thread is inside and then ends the run. If the calling thread is inside, `close` does not wait,
    because it would wait forever; the last thread to leave then ends the run.

    Args:
        end: ends the run; called once.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self._changed = threading.Condition()
        self._inside: set[int] = set()  # threads, by their ident
        self.closing = self.closed = False

    @contextmanager
    def forward(self, *, may_wait: bool = True) -> Iterator[bool]:
        """A context around a forward. Yields whether the run still goes on. If the run is about to
        end, a new forward waits until it has ended.

        Raises:
            RuntimeError: the new forward would have to wait, but a running forward waits for it.
        """
        outermost = threading.get_ident() not in self._inside
        try:
            yield self._enter(may_wait) if outermost else True
        finally:
            if outermost:
                self._leave()

    def close(self) -> None:
        with self._changed:
            self.closing = True
            if threading.get_ident() in self._inside:
                return
            self._changed.wait_for(lambda: not self._inside)
            self._finish()

    def require_open(self) -> None:
        if self.closing:
            raise RuntimeError("kvcomp: this run has been undone; call kvcomp.patch again")

    def _enter(self, may_wait: bool) -> bool:
        with self._changed:
            if not may_wait:
                self.require_open()
            self._changed.wait_for(lambda: self.closed or not self.closing)
            if self.closed:
                return False
            self._inside.add(threading.get_ident())
            return True

    def _leave(self) -> None:
        with self._changed:
            self._inside.discard(threading.get_ident())
            if self.closing and not self._inside:
                self._finish()

    def _finish(self) -> None:
        if not self.closed:
            self.closed = True
            self._changed.notify_all()
            self._end()
