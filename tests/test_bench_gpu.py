"""What the benchmarks do on a GPU, as far as it can be proven without one."""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import timing
from kvcomp.ops import OPS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOR_CPUS = {"append_rows", "linear_rows", "norm_rows", "rotate_rows"}


@pytest.fixture(scope="module")
def benchmarks():
    """Imports a module of benchmarks/."""
    if not BENCHMARKS.exists():
        pytest.skip("needs the sources")
    return importlib.import_module


# --- timing ---------------------------------------------------------------------------------------


class FakeGpu:
    """torch.cuda's words: calls are counted, and a call under capture does not run."""

    def __init__(self) -> None:
        self.capturing = self.waits_are_errors = False
        self.clock, self.ran, self.captured = 0.0, 0, 0

    def call(self) -> None:
        if self.capturing:
            self.captured += 1
        else:
            self.ran += 1

    def wait(self) -> None:
        assert not self.capturing, "a capture that fails is beyond repair"
        if self.waits_are_errors:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.ran += 1

    def install(self, monkeypatch) -> None:
        gpu = self

        class Scope:
            def __init__(self, *args, **kwargs) -> None:
                self.is_capture = args and isinstance(args[0], Graph)

            def __enter__(self):
                gpu.capturing = bool(self.is_capture)

            def __exit__(self, *problem):
                gpu.capturing = False

        class Graph:
            def replay(self):
                gpu.clock += gpu.captured * 1e-3  # ms: a microsecond a call

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        def set_mode(mode):
            gpu.waits_are_errors = mode == "error"

        names = {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
            "current_stream": lambda: None,
            "stream": lambda stream: Scope(),
            "synchronize": lambda: None,
            "CUDAGraph": Graph,
            "graph": Scope,
            "Event": Event,
            "set_sync_debug_mode": set_mode,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_sample_is_the_replay_of_a_graph_and_what_waits_is_never_captured(monkeypatch):
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    timings = timing.interleave(
        {"call": gpu.call, "wait": gpu.wait}, 6, device="cuda", calls_in_graph={"call": 32}
    )
    assert gpu.captured == 32 and not gpu.waits_are_errors
    assert timings["call"].in_graph and timings["call"].median == pytest.approx(1e-6)
    assert timings["call"].spread < 1e-6 and timings["call"].samples == 6
    assert not timings["wait"].in_graph and timings["wait"].median > 0

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        timing.interleave({"broken": broken}, 3, device="cuda")
    assert not gpu.waits_are_errors


@pytest.mark.parametrize("sets", [1, 2, 3, 7, 16, 19, 20, 21, 458])
def test_a_graph_visits_every_set_an_even_number_of_times(sets):
    calls = timing.rounds_in_graph(sets)
    assert calls >= 20 and calls % sets == 0 and calls // sets % 2 == 0


def test_the_spread_is_that_of_two_runs_of_the_same():
    assert timing._spread([1.0, 1.0, 1.1, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
    assert timing._spread([2.0, 1.0]) == 0.5 and timing._spread([1.0]) == 0


# --- what ours is compared with -------------------------------------------------------------------


@pytest.fixture
def inputs(benchmarks):
    attention = benchmarks("ops.attention")
    shape = attention.Shape(batch=3, heads=8, kv_heads=2, dim=64, tokens=96, dtype=torch.float32)
    run = SimpleNamespace(device="cpu", num_sets=lambda touched: 2)
    return shape, attention.attention_sets(shape, 32, run)[0]


def right(shape, x) -> torch.Tensor:
    return OPS["decode_attention"].reference(
        x.q, x.k, x.v, x.lens, None, 1, shape.scale, logits=None
    )[0]


def kvcache_attention(q, k, v, cache_seqlens, softmax_scale):
    """flash_attn_with_kvcache: q [B, 1, Hq, D], k and v [B, T, Hkv, D]."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = OPS["decode_attention"].reference(
        q[:, 0], k, v, cache_seqlens, None, 1, softmax_scale, None
    )
    return out[0][:, None]


class PagedWrapper:
    """FlashInfer's decode wrapper: pages [N, Hkv, page, D], a list of them for each sequence."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "HND" and workspace.dtype == torch.uint8

    def plan(self, indptr, indices, last, heads, kv_heads, dim, page, *, sm_scale, **dtypes):
        assert (last == page).all() and indptr[-1] == len(indices)
        self.rows = [indices[a:b].long() for a, b in itertools.pairwise(indptr)]
        self.scale = sm_scale

    def run(self, q, pages):
        outs = []
        for row, ids in enumerate(self.rows):
            k, v = (x[ids].transpose(0, 1).flatten(1, 2)[None] for x in pages)
            lens = torch.tensor([k.shape[2]], dtype=torch.int32)
            args = (q[row : row + 1], k, v, lens, None, 1, self.scale, None)
            outs.append(OPS["decode_attention"].reference(*args)[0])
        return torch.cat(outs)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_baseline_attends_to_the_same(benchmarks, inputs, monkeypatch, capsys):
    """The libraries are stood in for by what their documentation says that they take."""
    baselines = benchmarks("ops.gpu_baselines")
    stand_ins = {
        "flash_attn": {"flash_attn_with_kvcache": kvcache_attention},
        "flash_attn_interface": {
            "flash_attn_with_kvcache": lambda *args, **kw: (kvcache_attention(*args, **kw), None)
        },
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": PagedWrapper},
    }
    for name, members in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    flex = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    monkeypatch.setattr(baselines, "_compiled_flex", lambda: flex)  # compiling takes long
    found = baselines.usable(baselines.GPU_BASELINES, *inputs)
    left_out = set(baselines.GPU_BASELINES) - set(found)
    assert left_out <= {"sdpa-flash", "sdpa-efficient", "sdpa-cudnn"}  # not on every CPU
    told = capsys.readouterr().err
    assert all(f"{name}: left out, " in told for name in left_out)
    for name, call in found.items():
        torch.testing.assert_close(call(*inputs), right(*inputs), msg=lambda m, n=name: f"{n}: {m}")
    baselines._planned_wrapper.cache_clear()


def test_what_is_not_installed_is_left_out(benchmarks, inputs, monkeypatch, capsys):
    baselines = benchmarks("ops.gpu_baselines")
    for module in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    names = ("flash-attn-2", "flash-attn-3", "flashinfer", "sdpa-math")
    found = baselines.usable({n: baselines.GPU_BASELINES[n] for n in names}, *inputs)
    assert list(found) == ["sdpa-math"]
    assert capsys.readouterr().err.count("left out, ") == 3


def test_row_by_row_copies_bring_the_same_rows(benchmarks):
    fetching, common = benchmarks("ops.fetching"), benchmarks("ops.common")
    torch.manual_seed(3)
    pool = [torch.randn(1, 2, 256, 2, 32)]
    x = fetching._exchange(pool, 64, 32, "cpu")
    y = x._replace(k=x.k.clone(), v=x.v.clone(), slot_rows=x.slot_rows.clone(), lists=[*x.lists])
    before = x.k.clone()
    fetching._torch_delta(x)
    fetching._copies(y)
    assert not torch.equal(x.k, before)
    for a, b in zip(
        common.in_order(x.k, x.v, x.slot_rows), common.in_order(y.k, y.v, y.slot_rows), strict=True
    ):
        assert torch.equal(a, b)


# --- gpu.sh ---------------------------------------------------------------------------------------

STAND_IN = """#!/bin/sh
echo "$*" >> "$COMMANDS"
case "$*" in
  *get_device_name*) echo "NVIDIA H200 NVL" ;;
  *bench_decode.py*) exit 3 ;;
  *) ;;
esac
"""


@pytest.fixture
def gpu_script(tmp_path, monkeypatch):
    """Runs benchmarks/gpu.sh with programs that only write down how they are called."""
    if not BENCHMARKS.exists():
        pytest.skip("needs the sources")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "compute-sanitizer", "nvidia-smi", "nvcc"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    commands = tmp_path / "commands.txt"

    def run(**settings):
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": "python",
            "COMMANDS": str(commands),
            "KVCOMP_GPU_OUT": str(tmp_path / "out"),
            **settings,
        }
        script = ["bash", BENCHMARKS / "gpu.sh"]
        done = subprocess.run(
            script, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        called = commands.read_text().splitlines() if commands.exists() else []
        return done.returncode, done.stdout + done.stderr, called

    return run


@pytest.mark.parametrize("build", ["isolated", "plain", "installed"])
def test_gpu_script_takes_every_step_and_names_what_failed(gpu_script, benchmarks, build, tmp_path):
    code, output, called = gpu_script(KVCOMP_GPU_BUILD=build)
    assert code == 1 and output.rstrip().endswith("FAILED: decode decode-graph"), output
    installs = [line for line in called if "pip install" in line]
    assert len(installs) == (build != "installed")
    assert all("--no-deps --target" in line for line in installs)
    assert any("--no-build-isolation" in line for line in installs) == (build == "plain")
    for words in (
        "-m kvcomp info --selftest",
        "tests/test_ops.py -k test_op and ((cuda and not cuda-host) or triton)",
        "--tool memcheck --error-exitcode 1 python -m pytest",
        "--tool racecheck",
        "bench_ops.py --device cuda --json",
        "bench_decode.py --device cuda --json",
        "plot.py",
    ):
        assert any(words in line for line in called), words
    words = " ".join(line for line in called if "bench_ops.py" in line).split()
    on_gpus = set(benchmarks("bench_ops").BENCHMARKS) - FOR_CPUS
    assert on_gpus <= set(words), "an op is not measured"
    assert {p.stem for p in (tmp_path / "out" / "logs").iterdir()} >= {"versions", "racecheck"}


def test_gpu_script_says_what_it_lacks(gpu_script):
    code, output, _ = gpu_script(KVCOMP_GPU_BUILD="quickly")
    assert code == 2 and "expected isolated, plain or installed, got quickly" in output
    code, output, called = gpu_script(PYTHON="false")
    assert code == 2 and "torch sees no GPU" in output
    assert not any("bench" in line for line in called)
