"""Every GPU kernel compiles ahead of time without spills; no GPU is needed for that.

The report is benchmarks/compile_report.py, which `.ci/run` also prints for the CUDA kernels.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def compiled():
    """The modules of benchmarks/compiled."""
    if not BENCHMARKS.exists():
        pytest.skip("needs the sources")
    return importlib.import_module("compiled.cubins"), importlib.import_module("compile_report")


def test_triton_kernels_compile_without_spills(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    path = tmp_path / "compiled.json"
    # In a process of its own: this one has set Triton up for its interpreter.
    command = [sys.executable, BENCHMARKS / "compile_report.py", "--json", path]
    run = subprocess.run([*command, "--part", "triton"], capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(path.read_text())["triton"]
    assert {one["arch"] for one in kernels} == {"sm_80", "sm_90", "sm_100"}
    assert all(one["registers"] > 0 == one["spilled"] for one in kernels)


def test_every_op_is_compiled(compiled):
    calls = importlib.import_module("compiled.triton_kernels").CALLS
    folder = Path(importlib.import_module("kvcomp").__file__).parent / "ops" / "triton"
    files = [path for path in folder.glob("[a-z]*.py") if "@triton.jit" in path.read_text()]
    assert {op for op, *_ in calls} == {path.stem for path in files} and len(files) >= 8


SPILLING = """
__global__ void good(float* x) { x[threadIdx.x] *= 2; }
namespace kvcomp {
struct ProbeParams { float* x; int n; };
template <int N> __global__ void in_stack(const ProbeParams p) {
  float rows[N];
  for (int i = 0; i < N; ++i) rows[i] = p.x[i * p.n];
  for (int i = 0; i < p.n; ++i) p.x[i] = rows[int(p.x[i]) % N];
}
template __global__ void in_stack<100>(const ProbeParams);
}
"""


def test_what_is_kept_in_the_stack_is_found(compiled, tmp_path):
    """And so is what was not compiled for all architectures, or cannot be launched."""
    cubins, report = compiled
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs nvcc")
    source, target = tmp_path / "probe.cu", tmp_path / "probe.o"
    source.write_text(SPILLING)
    subprocess.run([nvcc, "-c", "-arch=sm_80", source, "-o", target], check=True)
    found = {one.name: one for one in cubins.read_usage(target)}
    assert set(found) == {"good(float*)", "in_stack<100>"}
    assert found["good(float*)"].spilled == 0 < found["good(float*)"].registers
    assert found["in_stack<100>"].spilled >= 400 and found["in_stack<100>"].arch == "sm_80"
    assert report.problems(list(found.values()), ["sm_80"]) == [
        f"in_stack<100> on sm_80: {found['in_stack<100>'].spilled} B spilled"
    ]
    good = found["good(float*)"]
    assert report.problems([good], ["sm_90a"]) == ["good(float*): not compiled for sm_90a"]
    large = good._replace(shared=200 << 10)
    assert report.problems([large], []) == ["good(float*) on sm_80: 204800 B of shared memory"]
    assert report.table([good, large._replace(arch="sm_90")])[1].split()[-3:] == [
        str(good.registers),
        "204800",
        "0",
    ]
