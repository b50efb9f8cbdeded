"""What a compiled step needs besides torch.compile: a place for its code, a sign of life."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import CompileConfig

from kvcomp import _torch, storage
from kvcomp.hf import linear
from kvcomp.progress import stderr_console

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def keep_code() -> None:
    """Let inductor keep code for the CPU where only this torch, on a CPU of this kind, finds it.

    Inductor's own folder is shared by all kinds of CPU (and of ATEN_CPU_CAPABILITY), and code for
    one of them computes nonsense on another. A folder that the user has named stays.
    """
    kind = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    folder = storage.folder("inductor") / f"torch-{torch.__version__}-{kind}"
    os.environ.setdefault(CACHE, str(folder))


def for_generate() -> CompileConfig:
    """What `generate` takes as `compile_config` to run compiled steps on a CPU as well."""
    keep_code()
    none: Any = None  # torch.compile's default; the annotation has no None
    config: Any = CompileConfig(fullgraph=True, mode=none)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    return config


def announced(step: Callable) -> Callable:
    """The first step for each shape of the tokens takes as long as the compiler: that is shown."""
    known: set[tuple[int, ...]] = set()

    @wraps(step)
    def told(**given: Any) -> Any:
        shape = tuple(given["input_ids"].shape)
        if shape in known:
            return step(**given)
        rows, began = shape[0], time.monotonic()
        what = "a decode step" + (f" of {rows} sequences" if rows > 1 else "")
        console = stderr_console()
        with console.status(f"Compiling {what}, which takes a minute the first time"):
            out = step(**given)
        known.add(shape)
        if sys.stderr is not None and sys.stderr.isatty():
            console.print(f"Compiled {what} in {time.monotonic() - began:.0f} s")
        return out

    return told


def frozen(step: Callable) -> Callable:
    """`step` compiled with the weights as constants, which inductor packs for the CPU."""

    @wraps(step)
    def packed(**given: Any) -> Any:
        with torch.no_grad(), _torch.freezing(), linear.left_to_torch():
            return step(**given)

    return packed
