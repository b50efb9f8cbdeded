"""Whether two answers are the same, by math-verify, in a process of its own.

A formula that a model wrote can take for ever to evaluate, or all memory, and math-verify's own
limit is a signal, which only the main thread can have, which does not stop a long integer power,
and which also counts the time that other processes have the processor. So a child process compares,
one pair a line, and ends itself when a pair takes too much of the processor.
"""

from __future__ import annotations

import atexit
import json
import re
import select
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from evaluation.notation import alike

SECONDS = 15.0  # of the processor, for a pair
HELD_UP = 900.0  # by the clock, after which the child is taken for dead
START_SECONDS = 120.0  # for the child's imports, on a busy machine
COMPARER = Path(__file__).with_name("comparer.py")
LONGEST = 2000  # characters of an answer; a longer one is compared as text alone

_SPACE = r"(?:(?<!\\)\\[,!;: ]|~|\s)+"
_NOISE = re.compile(  # a space between digits means something: 1 1/2 is not 11/2
    rf"(?<!\d){_SPACE}|{_SPACE}(?!\d|{_SPACE})|\\(?:left|right)(?![a-zA-Z])|^\$+|\$+$|\.$"
)


def require() -> None:
    """Raise ImportError if math-verify is not there."""
    if find_spec("math_verify") is None:
        raise ImportError(
            "kvcomp.accuracy: grading mathematics needs math-verify: pip install 'kvcomp[bench]'"
        )


def equal(gold: str, answer: str, *, percent: bool = False) -> bool:
    """Whether two answers have the same value, both LaTeX or plain text. Any thread may ask.

    Neither order nor direction matters: equal(a, b) is equal(b, a).

    Args:
        percent: the question asks for a percentage, so a bare number may be one.
    """
    if max(len(gold), len(answer)) > LONGEST:
        return gold.strip() == answer.strip()
    if (plain := _plain(answer)) and plain == _plain(gold):
        return True
    pair = alike(gold, answer, percent)
    return pair is not None and _child.ask(*pair)


def _plain(text: str) -> str:
    """Without spaces and what only sets a formula."""
    return _NOISE.sub("", re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text.strip()))


class _Child:
    """The process that compares, started at the first question and again after each failure."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str) -> bool:
        with self.lock:
            process = self.process or self.start()
            try:
                process.stdin.write(json.dumps([gold, answer, SECONDS]).encode() + b"\n")
                process.stdin.flush()
                reply = self.read(process, HELD_UP)
            except OSError:
                reply = b""
            if not reply:
                self.stop()
            return reply == b"true\n"

    def start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [sys.executable, str(COMPARER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if self.read(self.process, START_SECONDS) != b"ready\n":
            self.stop()
            raise RuntimeError("kvcomp.accuracy: math-verify did not start; try to import it")
        return self.process

    @staticmethod
    def read(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """A line, which the child writes as a whole; nothing if it takes too long or has died."""
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_child = _Child()
atexit.register(_child.stop)
