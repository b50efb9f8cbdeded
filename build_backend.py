"""The build backend: setuptools, plus the search for a CUDA compiler.

KVCOMP_CUDA=auto (the default) builds the CUDA kernels where a compiler can be had, off does not,
and require fails without one. KVCOMP_CUDA_ARCHS="80;90a" overrides the architectures.
"""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

# The compiler as PyPI wheels: the oldest minor of CUDA 13, whose code every 13.x driver runs.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + cuda_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + cuda_requirements()


def build_wheel(*args, **kwargs):
    wants_cuda()  # a build that cannot be is refused before setuptools fills the screen
    return build_meta.build_wheel(*args, **kwargs)


def build_editable(*args, **kwargs):
    wants_cuda()
    return build_meta.build_editable(*args, **kwargs)


def cuda_requirements():
    """The compiler wheels, where CUDA kernels are of use and no compiler is installed."""
    mode = cuda_mode()
    wanted = mode == "require" or (mode == "auto" and has_driver() and cuda_architectures())
    if wanted and sys.platform == "linux" and find_installed_nvcc() is None:
        return CUDA_WHEELS
    return []


def wants_cuda():
    """Whether to build the CUDA kernels if a compiler is found; exits where they are required."""
    mode = cuda_mode()
    if mode == "require" and find_nvcc() is None:
        raise SystemExit(
            "kvcomp: KVCOMP_CUDA=require, but no CUDA compiler was found: looked at CUDACXX,"
            " CUDA_HOME, PATH, /usr/local/cuda and the nvidia-cuda-nvcc wheel"
        )
    if mode == "require" and not cuda_architectures():
        raise SystemExit(
            "kvcomp: KVCOMP_CUDA=require, but no GPU here has compute capability 8.0 or later;"
            " KVCOMP_CUDA_ARCHS builds for others"
        )
    return mode != "off" and bool(cuda_architectures())


def cuda_mode():
    mode = os.environ.get("KVCOMP_CUDA", "auto").lower()
    if mode not in ("auto", "off", "require"):
        raise SystemExit(f"kvcomp: KVCOMP_CUDA: expected auto, off or require, got {mode!r}")
    return mode


def find_nvcc():
    """Path of nvcc: the user's choice, then the system's, then the wheels'; None without one."""
    return find_installed_nvcc() or find_wheel_nvcc()


def find_installed_nvcc():
    if chosen := os.environ.get("CUDACXX"):
        if shutil.which(chosen) is None:
            raise SystemExit(f"kvcomp: CUDACXX={chosen}: there is no such compiler")
        return shutil.which(chosen)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/bin" for home in homes if home]
    folders.insert(-1, os.environ.get("PATH", os.defpath))
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def find_wheel_nvcc():
    spec = importlib.util.find_spec("nvidia")  # a namespace package of all of NVIDIA's wheels
    for folder in spec.submodule_search_locations if spec else ():
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc")):
            return str(nvcc)
    return None


def nvcc_environment(nvcc):
    """The wheels keep their libraries in lib where nvcc looks in lib64: tell the host linker."""
    library_dir = Path(nvcc).resolve().parent.parent / "lib"
    if not (library_dir / "libcudart_static.a").exists():
        return {}
    known = os.environ.get("LIBRARY_PATH")
    return {"LIBRARY_PATH": f"{library_dir}:{known}" if known else str(library_dir)}


def cmake(*arguments, environment=(), **options):
    """Run the cmake of the environment that builds, which may not be activated."""
    tools = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    environment = os.environ | {"PATH": os.pathsep.join(tools)} | dict(environment)
    command = ["cmake", *map(str, arguments)]
    return subprocess.run(command, check=True, env=environment, **options)


def configuration(build_dir, **settings):
    """The arguments by which cmake configures a build."""
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        **settings,
    }
    return [
        *("-S", Path(__file__).resolve().parent, "-B", build_dir, "-G", "Ninja"),
        *(f"-D{name}={value}" for name, value in settings.items()),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]


def has_driver():
    """Whether there is a driver that runs what the wheels compile: one of CUDA 13 or later."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # a container may be given it only later
        return Path("/proc/driver/nvidia/version").exists()
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value >= 13000


def cuda_architectures():
    """Those asked for, else those of the GPUs present, else the common data-centre ones.

    The kernels need 8.0: nothing where all GPUs are older.
    """
    if asked := os.environ.get("KVCOMP_CUDA_ARCHS"):
        return re.split(r"[;,\s]+", asked.strip("; "))
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        lines = ""
    found = {line.strip().replace(".", "") for line in lines.splitlines() if line.strip()}
    if not found:
        return ["80", "90a"]
    # 9.0 is built as 90a, which has the instructions of that one architecture.
    return [{"90": "90a"}.get(arch, arch) for arch in sorted(found, key=int) if int(arch) >= 80]
