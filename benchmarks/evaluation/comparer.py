"""The process that compares formulas by math-verify: pairs come in, `true` or `false` goes out.

Started by `equivalence`, as a script: a pair is a line of JSON, [gold, answer, seconds]. A pair
that takes more seconds of the processor ends the process. The time of other processes does not
count, so verdicts do not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

MEMORY = 8 << 30  # bytes of address space


def main() -> None:
    folder = str(Path(__file__).parent)
    sys.path[:] = [x for x in sys.path if x != folder]  # or its files would hide modules
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    formats = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def value(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", formats, parsing_timeout=None)

    def includes(one: list, other: list) -> bool:
        return verify(one, other, timeout_seconds=None)

    print("ready", flush=True)
    for line in sys.stdin:
        *pair, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        try:
            one, other = map(value, pair)
            same = includes(one, other) and includes(other, one)  # it is not symmetric by itself
        except Exception:  # a formula may raise what it likes: it is not the answer
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if same else "false", flush=True)


if __name__ == "__main__":
    main()
