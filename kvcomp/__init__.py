"""kvcomp: kernels, ops and methods that make long chains of thought cheap to decode.

with kvcomp.patch(model, kvcomp.Delta(budget=1024)) as run:
    out = model.generate(**inputs, max_new_tokens=16384)
print(run.report())
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the native extension takes OpenMP from torch's runtime)

if importlib.util.find_spec("kvcomp._C") is None:  # in the root of a clone, after pip install .
    raise ImportError(
        f"kvcomp: {__path__[0]} is a source folder without the compiled extension, and hides an"
        " installed kvcomp: leave the folder above it, or run pip install -e . there"
    )

from kvcomp import methods, ops
from kvcomp.methods import *  # noqa: F403  (the methods, by name)

if TYPE_CHECKING:
    from kvcomp import delethink as delethink
    from kvcomp import models as models
    from kvcomp import thinking as thinking
    from kvcomp.hf.patch import patch as patch

__version__ = "0.1.0"
__all__ = ["ops", "patch"]
__all__ += methods.__all__


# Imported on first use -> the extra that installs what it needs.
_LATE = {"patch": "hf", "thinking": "hf", "delethink": "delethink", "models": "hf"}


def _late(module: str, name: str, extra: str) -> Any:
    """A module of kvcomp, which is `kvcomp.<name>` to the user or has that."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        needed = (missing.name or "kvcomp").partition(".")[0]
        if needed == "kvcomp":
            raise
        raise ModuleNotFoundError(
            f"kvcomp.{name} needs {needed}: pip install 'kvcomp[{extra}]'", name=missing.name
        ) from None


def __getattr__(name: str) -> Any:
    """`kvcomp.patch`, `.models` and `.thinking` need transformers, `.delethink` openai."""
    if name == "patch":
        return _late("kvcomp.hf", name, _LATE[name]).patch
    if name in _LATE:
        return _late(f"kvcomp.{name}", name, _LATE[name])
    raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")


def _calibrate(method: type[methods.Method], *args: Any, **options: Any) -> methods.Method:
    module = _late("kvcomp.hf.calibrate", f"{method.__name__}.calibrate", "hf")
    return module.calibrate(method, *args, **options)


methods.Method._calibrate = staticmethod(_calibrate)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
