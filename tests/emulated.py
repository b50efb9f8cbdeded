"""The CUDA code of the ops under the emulator: a module that the tests build, and no wheel holds.

It is built when a test calls it first, for one worker after the other: the first compiles, those
after it find nothing to do. The folder stays, so that later runs compile what has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from kvcomp import _C

ROOT = Path(__file__).resolve().parents[1]


@cache
def load() -> ModuleType:
    """The module, with the sanitizers that the extension has.

    Raises:
        RuntimeError: it cannot be built, and why.
    """
    if isinstance(built := _built(folder()), str):
        raise RuntimeError(f"the emulator of CUDA code cannot be built:\n{built}")
    spec = importlib.util.spec_from_file_location("_emulated", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder() -> Path:
    """Where it is built: for one Python, with its cmake, ninja and pybind11, and for no other."""
    of = sys.prefix, sys.version, _C.build_info()["sanitize"]
    return ROOT / "build" / f"emulated-{hashlib.sha256(repr(of).encode()).hexdigest()[:12]}"


@cache
def _built(folder: Path) -> Path | str:
    """Where the module is, or why it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = _build_backend()
    options = {
        # A compiler is not what the sanitizers should look at.
        "environment": {"LD_PRELOAD": ""},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            sanitize = _C.build_info()["sanitize"]
            backend.cmake(*backend.configuration(folder, KVCOMP_SANITIZE=sanitize), **options)
            backend.cmake("--build", folder, "--target", "_emulated", **options)
        except OSError as error:
            return f"cmake does not run: {error}"
        except subprocess.CalledProcessError as error:
            return error.stdout[-4000:]
    [module] = (folder / "csrc" / "emulated").glob("_emulated.*.so")
    return module


def _build_backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
