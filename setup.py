"""Runs CMake, which alone knows the sources and flags, and puts kvcomp._C into the package."""

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import cuda_architectures, cuda_mode, find_nvcc, nvcc_environment, wants_cuda

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        nvcc = find_nvcc() if wants_cuda() else None
        build_dir = Path(self.build_temp).resolve()
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": output_dir.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "KVCOMP_CUDA": "ON" if nvcc else "OFF",
            "KVCOMP_SANITIZE": os.environ.get("KVCOMP_SANITIZE", ""),
        }
        # The environment that builds may not be activated; its cmake and ninja come first.
        tools = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
        environment = os.environ | {"PATH": os.pathsep.join(tools)}
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            settings["KVCOMP_CUDA_ARCHS"] = ";".join(cuda_architectures())
            environment |= nvcc_environment(nvcc)

        def cmake(*args):
            try:
                subprocess.run(["cmake", *map(str, args)], check=True, env=environment)
            except OSError as error:
                raise SystemExit(f"kvcomp: cmake does not run: {error}") from None
            except subprocess.CalledProcessError as error:
                raise SystemExit(error.returncode) from None  # cmake has said why

        cmake(
            *("-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            *(f"-D{name}={value}" for name, value in settings.items()),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        cmake("--build", build_dir)
        cmake("--install", build_dir)
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
