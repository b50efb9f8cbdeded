"""Registers, shared memory and spills of compiled kernels, as the machine code says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """One kernel on one architecture."""

    name: str
    arch: str  # "sm_90a"
    registers: int  # of a thread
    shared: int  # bytes of a block, without what a launch of ours asks for beyond
    spilled: int  # bytes of a thread's stack, which holds nothing else


FUNCTION = re.compile(
    r"arch = (?P<arch>sm_\w+)"
    r"|Function (?P<name>.+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+)"
    r" SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)


def read_usage(path: Path) -> list[Kernel]:
    """All kernels in an extension or object file; in a cubin too, which does not say its `arch`.

    Raises:
        FileNotFoundError: there is no cuobjdump, which CUDA and Triton bring.
    """
    report = _output(_cuobjdump(), "-res-usage", path)
    if demangle := shutil.which("c++filt"):
        report = subprocess.run([demangle], input=report, capture_output=True, text=True).stdout
    kernels, arch = [], ""
    for found in FUNCTION.finditer(report):
        if found["arch"]:
            arch = found["arch"]
            continue
        spilled = int(found["stack"]) + int(found["local"])
        registers, shared = int(found["registers"]), int(found["shared"])
        kernels.append(Kernel(_short(found["name"]), arch, registers, shared, spilled))
    return kernels


def _cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    if importlib.util.find_spec("triton"):
        import triton

        return triton.knobs.nvidia.cuobjdump.path
    raise FileNotFoundError("cuobjdump: neither on PATH nor brought by an installed triton")


def _output(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def _short(name: str) -> str:
    """Without the return type, our namespace and the parameters."""
    name = re.sub(r"\(kvcomp::\w+Params.*\)$", "", name)
    return name.removeprefix("void ").replace("kvcomp::", "").replace("__nv_bfloat16", "bf16")
