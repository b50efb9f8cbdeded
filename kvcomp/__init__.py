"""kvcomp: kernels, ops and methods that make long chains of thought cheap to decode.

with kvcomp.patch(model, kvcomp.Delta(budget=1024)) as run:
    out = model.generate(**inputs, max_new_tokens=16384)
print(run.report())
"""

import importlib

import torch  # noqa: F401  (first: the native extension takes OpenMP from torch's runtime)

from kvcomp import methods, ops
from kvcomp.methods import *  # noqa: F403  (the methods, by name)

__version__ = "0.1.0"
__all__ = ["ops", "patch"]  # noqa: F405
__all__ += methods.__all__


_LATE = {"patch": "hf", "delethink": "trace"}  # imported when asked for -> what installs its needs


def __getattr__(name: str):
    """`kvcomp.patch` needs transformers, `kvcomp.delethink` openai: both are imported late."""
    if name not in _LATE:
        raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")
    try:
        if name == "patch":
            from kvcomp.hf import patch

            return patch
        return importlib.import_module(f"kvcomp.{name}")
    except ModuleNotFoundError as missing:
        needed = (missing.name or "kvcomp").partition(".")[0]
        if needed == "kvcomp":
            raise
        install = f"pip install 'kvcomp[{_LATE[name]}]'"
        raise ModuleNotFoundError(
            f"kvcomp.{name} needs {needed}: {install}", name=missing.name
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
