"""Versions, devices, the build, and which implementation of each op runs on which device."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kvcomp
from kvcomp import _C
from kvcomp.ops._registry import OPS, PREFERENCE, Op
from kvcomp.ops.linear_rows import MAX_ROWS

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("torch", "transformers", "triton", "numpy")


def gather() -> dict[str, Any]:
    """Everything that `kvcomp info` shows, ready for JSON. Needs only torch and numpy."""
    build = _C.build_info()
    return {
        "versions": versions(),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": _C.cpu_isa(),
            "isas_built": build["cpu_isas"],
            "isa_limit": os.environ.get("KVCOMP_ISA"),
            "linear_rows": MAX_ROWS,
        },
        "gpus": gpus(),
        "cuda": {
            "built": build["with_cuda"],
            "archs": build["cuda_archs"],
            "version": build["cuda_version"] or None,
            "torch_version": torch.version.cuda,
        },
        "build": {"compiler": build["compiler"], "sanitize": build["sanitize"] or None},
        "ops": {name: describe(op) for name, op in OPS.items()},
    }


def versions() -> dict[str, str | None]:
    """Versions of kvcomp, Python and related packages, without importing them; None: absent."""
    found: dict[str, str | None] = {
        "kvcomp": kvcomp.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with its build tag: +cpu, +cu130
    return found


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        for p in found
    ]


def describe(op: Op) -> dict[str, Any]:
    """The implementations of an op, which one runs on each device, and why no faster one does."""
    passed_over = {
        device: {
            choice: op.missing.get(choice, "absent")
            for choice in preference[: preference.index(op.bound[device])]
        }
        for device, preference in PREFERENCE.items()
    }
    return {
        "implementations": sorted(op.impls),
        "missing": dict(op.missing),
        "bound": dict(op.bound),
        "passed_over": {device: better for device, better in passed_over.items() if better},
    }


def tables(info: dict[str, Any]) -> list[Table]:
    """The same as tables: versions and devices, and a row per op."""
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, version in info["versions"].items():
        facts.add_row(name, version or "not installed")
    for label, text in (
        ("CPU", _cpu_line(info["cpu"])),
        ("CPU kernels", _isa_line(info["cpu"])),
        ("linear layers", _linear_line(info["cpu"])),
        *(("GPU", _gpu_line(gpu)) for gpu in info["gpus"] or [None]),
        ("CUDA kernels", _cuda_line(info["cuda"])),
    ):
        facts.add_row(label, text)

    ops = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("op", "on CPU", "on GPU", "implementations", "why not a faster one"):
        ops.add_column(heading, overflow="fold")
    for name, op in info["ops"].items():
        reasons = [
            f"{choice}: {reason}"
            for better in op["passed_over"].values()
            for choice, reason in better.items()
        ]
        ops.add_row(
            name,
            op["bound"]["cpu"],
            op["bound"]["cuda"],
            ", ".join(op["implementations"]),
            "; ".join(reasons) or "the fastest runs",
        )
    return [facts, ops]


def _cpu_line(cpu: dict[str, Any]) -> str:
    return f"{cpu['model']}, {cpu['cores']} logical cores, {cpu['threads']} threads used"


def _isa_line(cpu: dict[str, Any]) -> str:
    limit = f" (KVCOMP_ISA={cpu['isa_limit']})" if cpu["isa_limit"] else ""
    return f"{cpu['isa']} in use{limit}, built: {', '.join(cpu['isas_built'])}"


def _linear_line(cpu: dict[str, Any]) -> str:
    return (
        f"of a patched model on the CPU: linear_rows ({cpu['isa']}) for up to {cpu['linear_rows']}"
        " rows, norm_rows and rotate_rows without gradients, torch for more"
    )


def _gpu_line(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "none that torch can use"
    return f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, capability {gpu['capability']}"


def _cuda_line(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return "not built (no nvcc at build time, or KVCOMP_CUDA=off)"
    return f"built for {', '.join(cuda['archs'])} with CUDA {cuda['version']}"
