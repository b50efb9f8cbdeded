"""Triton runs in its interpreter where there is no GPU; outputs start as NaN; seeds are fixed."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # workers of xdist get that of their parent
    # Inductor may load code that it made under another ATEN_CPU_CAPABILITY, which crashes or
    # computes nonsense. So each run compiles for itself.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="kvcomp-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest

import emulated
import kvcomp
from kvcomp.ops import _registry
from kvcomp.selftest import compare

_registry.add_emulated(emulated.load)

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # which share the cores
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))


def pytest_addoption(parser):
    parser.addoption(
        "--write-matrix",
        action="store_true",
        help="write what test_model_matrix.py and test_every_model.py find into docs/models.md",
    )


@pytest.fixture
def fresh_dynamo():
    """No compiled code, and counters at 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def away_from_the_sources(monkeypatch, tmp_path):
    """Programs that a test starts import the kvcomp that the test has.

    From the root of a clone they would find the source folder first, which has no extension.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(kvcomp.__file__).parents[1]))


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models and caches: more threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_outputs():
    with compare.poisoned_outputs():
        yield


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command line in this process: exit code, standard output, standard error."""
    from kvcomp import cli  # needs typer

    monkeypatch.setenv("COLUMNS", "140")

    def run(*args):
        code = cli.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run
