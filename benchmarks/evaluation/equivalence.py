"""Whether two answers are the same, by math-verify, in a process of its own.

A formula that a model wrote can take for ever to evaluate, or all memory, and math-verify's own
limit is a signal, which only the main thread can have, and which does not stop a long integer
power. So a child process compares, one pair a line, and is killed when it takes too long.
"""

from __future__ import annotations

import atexit
import json
import re
import resource
import select
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

SECONDS = 20.0  # for a pair, with which math-verify should be done after its own 5 + 5 + 5
START_SECONDS = 120.0  # for the child's imports, on a busy machine
MEMORY = 8 << 30  # bytes of the child's address space
LONGEST = 2000  # characters of an answer; a longer one is compared as text alone

_NOISE = re.compile(r"\\[,!;: ]|~|\s+|\\(?:left|right)(?![a-zA-Z])|^\$+|\$+$|\.$")


def require() -> None:
    """Raise ImportError if math-verify is not there."""
    if find_spec("math_verify") is None:
        raise ImportError(
            "kvcomp.accuracy: grading mathematics needs math-verify: pip install 'kvcomp[bench]'"
        )


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` has the value of `gold`, both LaTeX or plain text. Any thread may ask."""
    if len(answer) > LONGEST + len(gold):
        return False
    if (plain := _plain(answer)) and plain == _plain(gold):
        return True
    return _child.ask(_tidy(gold), _tidy(answer))


def _plain(text: str) -> str:
    """Without spaces and what only sets a formula."""
    return _NOISE.sub("", re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text.strip()))


def _tidy(text: str) -> str:
    """Without what math-verify stumbles over: thin spaces in numbers, and a full stop."""
    return re.sub(r"(?<=\d)(?:\\[,!;: ]|~)+(?=\d)", "", text).strip().strip("$").rstrip(". ")


class _Child:
    """The process that compares, started at the first question and again after each failure."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str) -> bool:
        with self.lock:
            process = self.process or self.start()
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                process.stdin.flush()
                reply = self.read(process, SECONDS)
            except OSError:
                reply = b""
            if not reply:
                self.stop()
            return reply == b"true\n"

    def start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
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


def _serve() -> None:
    """The child: pairs come in, `true` or `false` goes out."""
    folder = str(Path(__file__).parent)
    sys.path[:] = [x for x in sys.path if x != folder]  # or its files would hide modules
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    formats = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def value(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", formats)

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            gold, answer = json.loads(line)
            same = verify(value(gold), value(answer))
        except Exception:  # a formula may raise what it likes: it is not the answer
            same = False
        print("true" if same else "false", flush=True)


if __name__ == "__main__":
    _serve()
