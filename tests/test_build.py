"""The build as users run it, what the extension links, and the native boundary."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvcomp import _C

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def backend():
    """A fresh copy of the build backend's module, whose functions a test may replace."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- one isolated build: source tree -> sdist -> wheel -----------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the unpacked wheel, and what the build said."""
    folder = tmp_path_factory.mktemp("build")
    # Only what is not hidden or built: the sdist must need nothing else.
    ignored = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source"],
        cwd=folder,
        env=os.environ | {"KVCOMP_CUDA": "auto", "KVCOMP_CUDA_ARCHS": "90a", "KVCOMP_SANITIZE": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if re.search("Failed to establish a new connection|Name or service not known", run.stdout):
        pytest.skip("the package registry is out of reach, and an isolated build needs it")
    assert run.returncode == 0, run.stdout
    [wheel] = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "wheel")
    return folder / "wheel", run.stdout


@pytest.fixture(scope="module")
def extension(built):
    [path] = (built[0] / "kvcomp").glob("_C*.so")
    return path


def test_the_build_ends_with_a_summary(built):
    assert re.search(r"^kvcomp: CPU kernels: scalar.*; CUDA kernels: ", built[1], re.MULTILINE)


def test_wheel_holds_the_package_and_nothing_else(built):
    folder, _ = built
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"kvcomp"}
    assert (folder / "kvcomp" / "py.typed").exists()
    modules = {path.relative_to(ROOT) for path in (ROOT / "kvcomp").rglob("*.py")}
    assert modules == {path.relative_to(folder) for path in folder.rglob("*.py")}


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not installed")
def test_extension_needs_neither_torch_nor_openmp_nor_cuda(extension):
    dynamic = subprocess.check_output(["readelf", "-d", extension], text=True)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic))
    assert needed <= {"libc", "libm", "libgcc_s", "libstdc++", "libdl", "librt", "libpthread"} | {
        name for name in needed if name.startswith("ld-linux")
    }
    symbols = subprocess.check_output(["readelf", "-W", "--dyn-syms", extension], text=True)
    undefined = re.findall(r" UND (\S+)", symbols)
    assert not [name for name in undefined if re.search("torch|c10|N2at|^cu[A-Z]|^cuda", name)]


def test_the_emulator_is_no_part_of_the_wheel(built, extension):
    assert b"kvcomp cuda-host" not in extension.read_bytes()
    assert len(list(built[0].rglob("*.so"))) == 1


def test_wheel_imports_without_a_gpu(built, tmp_path):
    code = "import json, kvcomp, kvcomp._C as c; print(json.dumps([c.__file__, c.build_info()]))"
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(built[0]), "CUDA_VISIBLE_DEVICES": ""},
        text=True,
    )
    path, info = json.loads(output)
    assert Path(path).is_relative_to(built[0])
    assert info["version"] == "0.1.0" and info["cpu_isas"][0] == "scalar"


def test_cuda_half_is_present_where_a_compiler_is(built, extension, backend):
    if backend.find_installed_nvcc() is None and not backend.has_driver():
        assert "CUDA kernels: none (no nvcc" in built[1]
        pytest.skip("no nvcc, and no driver to fetch it for")
    assert re.search(r"CUDA kernels: 90a \(nvcc \d", built[1])
    assert b".nv_fatbin" in extension.read_bytes()


@pytest.mark.parametrize("how", [["-c", "import kvcomp"], ["-m", "kvcomp", "info"]])
def test_a_source_folder_that_hides_the_package_says_so(tmp_path, how):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "kvcomp", tmp_path / "kvcomp", ignore=ignored)
    run = subprocess.run(
        [sys.executable, "-S", *how],  # past an editable install, which would find its extension
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(torch.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    last = run.stderr.splitlines()[-1]
    assert f"kvcomp: {tmp_path / 'kvcomp'} is a source folder" in last
    assert "hides an installed kvcomp: leave the folder above it, or run pip install -e ." in last


# --- the search for a CUDA compiler ------------------------------------------------------------


def test_require_without_a_compiler_is_one_clear_line():
    code = (
        "import build_backend as b; b.find_nvcc = lambda: None; b.build_wheel('unused')"  # no build
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"KVCOMP_CUDA": "require"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    [line] = (run.stdout + run.stderr).splitlines()
    assert line.startswith("kvcomp: KVCOMP_CUDA=require, but no CUDA compiler was found")


def test_unknown_mode_is_refused(backend, monkeypatch):
    monkeypatch.setenv("KVCOMP_CUDA", "on")
    with pytest.raises(SystemExit, match="expected auto, off or require, got 'on'"):
        backend.cuda_mode()


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler's wheels are for Linux")
@pytest.mark.parametrize(
    ("mode", "driver", "nvcc", "fetched"),
    [
        ("auto", True, None, True),
        ("auto", False, None, False),
        ("auto", True, "/usr/bin/nvcc", False),
        ("require", False, None, True),
        ("off", True, None, False),
    ],
)
def test_compiler_is_fetched_where_it_is_of_use(backend, monkeypatch, mode, driver, nvcc, fetched):
    monkeypatch.setenv("KVCOMP_CUDA", mode)
    monkeypatch.setattr(backend, "has_driver", lambda: driver)
    monkeypatch.setattr(backend, "find_installed_nvcc", lambda: nvcc)
    assert bool(backend.cuda_requirements()) == fetched


def test_compiler_is_searched_in_order(backend, monkeypatch, tmp_path):
    for name in ("chosen", "home/bin", "path"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for variable, value, found in [
        ("CUDACXX", str(tmp_path / "chosen" / "nvcc"), "chosen"),
        ("CUDA_HOME", str(tmp_path / "home"), "home/bin"),
        ("PATH", str(tmp_path / "path"), "path"),
    ]:
        for other in {"CUDACXX", "CUDA_HOME"} - {variable}:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(variable, value)
        assert backend.find_nvcc() == str(tmp_path / found / "nvcc")


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("80; 90a", "", ["80", "90a"]),
        ("", "9.0\n9.0\n8.6\n", ["86", "90a"]),
        ("", "12.0\n7.5\n8.9\n", ["89", "120"]),
        ("", "7.5\n", []),
        ("", "", ["80", "90a"]),
    ],
)
def test_architectures(backend, monkeypatch, tmp_path, asked, gpus, expected):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KVCOMP_CUDA_ARCHS", asked)
    assert backend.cuda_architectures() == expected


def test_gpus_that_are_too_old_do_not_stop_an_install(backend, monkeypatch):
    monkeypatch.setattr(backend, "has_driver", lambda: True)
    monkeypatch.setattr(backend, "find_installed_nvcc", lambda: None)
    monkeypatch.setattr(backend, "cuda_architectures", list)
    monkeypatch.setenv("KVCOMP_CUDA", "auto")
    assert not backend.wants_cuda() and not backend.cuda_requirements()
    monkeypatch.setenv("KVCOMP_CUDA", "require")
    monkeypatch.setattr(backend, "find_nvcc", lambda: "/usr/bin/nvcc")
    with pytest.raises(SystemExit, match=r"compute capability 8\.0 or later"):
        backend.wants_cuda()


@pytest.mark.parametrize(("version", "enough"), [(12080, False), (13000, True), (13020, True)])
def test_a_driver_older_than_the_wheels_does_not_count(backend, monkeypatch, version, enough):
    class Driver:
        def cuDriverGetVersion(self, into):
            into._obj.value = version

    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: Driver())
    assert backend.has_driver() == enough


# --- the native boundary: what is there ----------------------------------------------------------


def test_the_extension_has_what_the_package_calls():
    """Also what only a GPU would ask for."""
    code = "".join(path.read_text() for path in (ROOT / "kvcomp").rglob("*.py"))
    called = set(re.findall(r"(?<![.\w])(?:_C|extension)\.(\w+)\(", code))
    assert {"page_scores", "decode_attention_blocks", "build_info"} <= called
    assert not [name for name in called if not hasattr(_C, name)]


# --- the native boundary: views of tensors ------------------------------------------------------

# Through DLPack's C exchange API where torch has it, and through attributes: both must agree.
through = pytest.mark.parametrize("dlpack", [True, False], ids=["dlpack", "attributes"])


@through
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.int32, torch.int64, torch.uint8, torch.bool),
    ],
)
def test_view_of_every_dtype(dlpack, dtype):
    tensor = torch.zeros(2, 3, dtype=dtype)
    view = _C.view_tensor(tensor, dlpack)
    assert view == (tensor.data_ptr(), [2, 3], [3, 1], f"{dtype}".removeprefix("torch."), "cpu")


@through
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.zeros(0, 4),
        torch.zeros(4, 6)[1:, 2::2],
        torch.zeros(2, 3, 4).permute(2, 0, 1),
        torch.zeros(1, 3).expand(5, 3),
        torch.nn.Parameter(torch.zeros(3)),
        torch.zeros(3, requires_grad=True) * 2,
    ],
    ids=["scalar", "empty", "slice", "permuted", "expanded", "parameter", "in a graph"],
)
def test_view_of_every_layout(dlpack, tensor):
    pointer, shape, strides, _, _ = _C.view_tensor(tensor, dlpack)
    assert (pointer, tuple(shape)) == (tensor.data_ptr(), tensor.shape)
    assert tuple(strides) == tensor.stride()


@through
@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (None, TypeError, "argument 'tensor': expected a torch.Tensor, got NoneType"),
        ([1.0], TypeError, "argument 'tensor': expected a torch.Tensor, got list"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.zeros(2, device="meta"), ValueError, "expected a dense CPU or CUDA tensor"),
        (torch.zeros(2, 2).to_sparse(), ValueError, "expected a dense CPU or CUDA tensor"),
        (torch.zeros((1,) * 7), ValueError, "got more than 6 dimensions"),
    ],
    ids=["none", "list", "complex", "meta", "sparse", "7 dimensions"],
)
def test_what_cannot_be_viewed_is_refused(dlpack, argument, error, message):
    with pytest.raises(error, match=re.escape(message)) as refusal:
        _C.view_tensor(argument, dlpack)
    assert str(refusal.value).startswith("kvcomp.view_tensor: ")


def test_a_fake_tensor_has_no_memory_to_view():
    with FakeTensorMode():
        fake = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="got one without memory"):
        _C.view_tensor(fake, True)
