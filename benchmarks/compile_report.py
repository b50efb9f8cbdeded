"""Registers, shared memory and spills of every GPU kernel, from the compilers. Needs no GPU.

    python benchmarks/compile_report.py                        # CUDA: what this build contains
    python benchmarks/compile_report.py --arch 80 90a 100      # and at least these
    python benchmarks/compile_report.py --part triton --json compiled.json

The CUDA kernels are those in the installed extension, so build it for the architectures you want
to see (KVCOMP_CUDA_ARCHS="80;90a;100"); the Triton kernels are compiled here, in the
configurations that their launchers choose. The exit code is 1 if a kernel spills, asks for more
shared memory than a block can have, or is missing for an architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from compiled.cubins import Kernel, read_usage
from compiled.triton_kernels import SHARED_LIMIT, triton_kernels
from kvcomp import _C

BEYOND = {"cuda": " without what a launch adds", "triton": ""}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=("cuda", "triton"), default=["cuda", "triton"])
    parser.add_argument("--arch", nargs="+", default=[], metavar="SM", help="that CUDA must have")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    os.environ["TRITON_INTERPRET"] = "0"  # before it is imported: it would not compile
    report: dict[str, list[Kernel]] = {}
    complaints: list[str] = []
    if "cuda" in options.part:
        if _C.build_info()["with_cuda"]:
            report["cuda"] = read_usage(Path(_C.__file__))
        elif options.arch:
            complaints.append("this build has no CUDA kernels")
        else:
            print("this build has no CUDA kernels")
    if "triton" in options.part:
        if find_spec("triton"):
            report["triton"] = triton_kernels()
        else:
            print("triton is not installed")
    for part, kernels in report.items():
        print(f"\n{part}: registers, bytes of shared memory{BEYOND[part]}, bytes spilled")
        print(*table(kernels), sep="\n")
        wanted = [f"sm_{arch}" for arch in options.arch] if part == "cuda" else []
        complaints += problems(kernels, wanted)
    if options.json:
        rows = {part: [one._asdict() for one in kernels] for part, kernels in report.items()}
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def table(kernels: list[Kernel]) -> list[str]:
    """A line per kernel, a column per architecture."""
    archs = list(dict.fromkeys(one.arch for one in kernels))
    by_name: dict[str, dict[str, Kernel]] = {}
    for one in kernels:
        by_name.setdefault(one.name, {})[one.arch] = one
    width = max(map(len, by_name))
    lines = [f"{'':{width}}" + "".join(f"{arch:>20}" for arch in archs)]
    for name, found in sorted(by_name.items()):
        cells = [
            f"{one.registers:>7} {one.shared:>7} {one.spilled:>4}" if one else f"{'-':>20}"
            for one in map(found.get, archs)
        ]
        lines.append(f"{name:{width}}" + "".join(cells))
    return lines


def problems(kernels: list[Kernel], wanted: list[str]) -> list[str]:
    """A line for each kernel that must not be as it is, and for what is missing."""
    limits = {f"sm_{capability}": limit for capability, limit in SHARED_LIMIT.items()}
    found = [f"{one.name} on {one.arch}: {one.spilled} B spilled" for one in kernels if one.spilled]
    found += [
        f"{one.name} on {one.arch}: {one.shared} B of shared memory"
        for one in kernels
        if one.shared > limits.get(one.arch, one.shared)
    ]
    names = {one.name for one in kernels}
    for arch in dict.fromkeys([*wanted, *(one.arch for one in kernels)]):
        missing = names - {one.name for one in kernels if one.arch == arch}
        found += [f"{name}: not compiled for {arch}" for name in sorted(missing)]
    return found


if __name__ == "__main__":
    sys.exit(main())
