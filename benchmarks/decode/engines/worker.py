"""Runs one engine: a job as the first line of standard input, then a call a line, answers as JSON.

    PYTHON worker.py llama_cpp_engine

An answer is {"value": ...} or {"error": "..."}. Whatever the engine itself prints goes to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = None
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            if name == "load":
                engine = import_module(sys.argv[1]).Engine(*arguments)
                value = engine.versions
            else:
                value = getattr(engine, name)(*arguments)
            answer = {"value": value}
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def prompt(row: int, tokens: int) -> list[int]:
    """Ids of a sequence; a longer one begins with a shorter one."""
    return [3 + (row * 7919 + i * 31 + i * i * 17) % 1000 for i in range(tokens)]


if __name__ == "__main__":
    sys.exit(main())
