"""Runs CMake, which alone knows the sources and flags, and puts kvcomp._C into the package."""

import atexit
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import (
    cmake,
    configuration,
    cuda_architectures,
    cuda_mode,
    find_nvcc,
    nvcc_environment,
    wants_cuda,
)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        nvcc = find_nvcc() if wants_cuda() else None
        build_dir = Path(self.build_temp).resolve()
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        settings = {
            "CMAKE_INSTALL_PREFIX": output_dir.parent,
            "KVCOMP_CUDA": "ON" if nvcc else "OFF",
            "KVCOMP_SANITIZE": os.environ.get("KVCOMP_SANITIZE", ""),
        }
        environment = {}
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            settings["KVCOMP_CUDA_ARCHS"] = ";".join(cuda_architectures())
            environment = nvcc_environment(nvcc)
        try:
            cmake(*configuration(build_dir, **settings), environment=environment)
            cmake("--build", build_dir, environment=environment)
            cmake("--install", build_dir)
        except OSError as error:
            raise SystemExit(f"kvcomp: cmake does not run: {error}") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(error.returncode) from None  # cmake has said why
        why_none = "no nvcc or no GPU for them; set KVCOMP_CUDA=require to see why"
        why_none = "off" if cuda_mode() == "off" else why_none
        summary = (build_dir / "summary.txt").read_text()
        print(summary if nvcc else f"{summary} ({why_none})", flush=True)


# A fresh build directory each time. One kept from an isolated build points at a ninja and a
# pybind11 that are gone, and a kept build/lib carries deleted modules into the next wheel.
build_base = tempfile.mkdtemp(prefix="kvcomp-build-")
atexit.register(shutil.rmtree, build_base, ignore_errors=True)

setup(
    ext_modules=[Extension("kvcomp._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    options={"build": {"build_base": build_base}},
)
