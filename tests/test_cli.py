"""The command line."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from torch._dynamo.utils import counters

import kvcomp
import kvcomp.demo
from kvcomp import METHODS, cli, reasoner
from kvcomp.ops import OPS
from kvcomp.reasoner import task
from slow.static_decoding import compile_config

PROBLEM = task.make_problem(nodes=4, steps=8, seed=1)
SHORT = ["--set", "page_size=4", "--set", "recent=2"]


# --- info -----------------------------------------------------------------------------------------


def test_info_names_every_op_and_package(call):
    code, out, _ = call("info")
    assert code == 0
    for word in (*OPS, "kvcomp", "torch", "transformers", "triton", "CPU kernels", "CUDA kernels"):
        assert word in out
    assert f"linear_rows ({kvcomp._C.cpu_isa()}) for up to 32 rows" in out


def test_info_json(call):
    code, out, _ = call("info", "--json")
    info = json.loads(out)
    assert code == 0
    assert set(info) == {"versions", "cpu", "gpus", "cuda", "build", "ops"}
    assert info["cpu"]["isa"] in info["cpu"]["isas_built"]
    assert info["cpu"]["threads"] >= 1 and info["cpu"]["linear_rows"] == 32
    for name, op in info["ops"].items():
        assert op["bound"] == OPS[name].bound
        assert set(op["bound"].values()) <= set(op["implementations"]) == set(OPS[name].impls)
        for device, better in op["passed_over"].items():
            assert better and op["bound"][device] not in better
            assert all(op["missing"][choice] == reason for choice, reason in better.items())


# --- demo -----------------------------------------------------------------------------------------


def test_demo(call, tmp_path):
    pytest.importorskip("matplotlib")
    result_file, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    code, out, _ = call(
        *("demo", "--problems", 2, "--nodes", 4, "--steps", 20, "--budget", 32),
        *("--method", "all", "--device", "cpu", "--json", result_file, "--plot", picture),
    )
    assert code == 0
    assert all(name in out for name in METHODS)
    result = json.loads(result_file.read_text())
    meta, rows = result["meta"], {row["method"]: row for row in result["rows"]}
    assert meta["budget"] == 32 and meta["context"] == meta["prompt_tokens"] + 80
    assert meta["versions"]["torch"]
    assert next(iter(rows)) == "full" and set(rows) == set(METHODS)
    for row in rows.values():
        assert 0 <= row["step_accuracy"] <= 1 and 0 <= row["final_accuracy"] <= 1
        assert 0 < row["attended_ratio"] <= 1
        assert row["tokens_decoded"] == 2 * 79  # each row's first token comes from the prefill
        assert row["tokens_per_second"] > 0
        assert 0 < row["kv_bytes_read_per_token"] <= rows["full"]["kv_bytes_read_per_token"]
    assert rows["full"]["attended_ratio"] == 1
    assert rows["delta"]["attended_ratio"] < 1
    assert rows["delta"]["kv_bytes_peak"] == rows["full"]["kv_bytes_peak"]  # it drops nothing
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_default_is_half_of_the_context_and_the_methods(call, tmp_path):
    file = tmp_path / "demo.json"
    assert call("demo", "--problems", 1, "--steps", 16, "--json", file)[0] == 0
    content = json.loads(file.read_text())
    meta, names = content["meta"], [row["method"] for row in content["rows"]]
    assert meta["context"] / 2 - 16 < meta["budget"] <= meta["context"] / 2
    assert names[0] == "full"
    assert {name for name, cls in METHODS.items() if not cls.baseline} < set(names) < set(METHODS)


def test_delta_at_a_fifth_of_the_context_keeps_the_steps(call, tmp_path):
    file = tmp_path / "demo.json"
    names = ("--method", "full", "--method", "delta", "--method", "random-pages")
    size = ("--problems", 4, "--steps", 64, "--budget", 64)  # of 357
    assert call("demo", *names, *size, "--json", file)[0] == 0
    full, delta, at_random = json.loads(file.read_text())["rows"]
    assert full["step_accuracy"] >= 0.98
    assert delta["step_accuracy"] >= full["step_accuracy"] - 0.01
    assert delta["attended_ratio"] == pytest.approx(at_random["attended_ratio"])
    assert delta["attended_ratio"] < 0.85
    assert at_random["step_accuracy"] < full["step_accuracy"] - 0.1


def test_lazy_eviction_at_half_of_the_bytes_keeps_the_steps(call, tmp_path):
    file = tmp_path / "demo.json"
    names = ("--method", "full", "--method", "lazy-eviction", "--method", "recency-window")
    assert call("demo", *names, "--problems", 2, "--json", file)[0] == 0
    full, lazy, recent = json.loads(file.read_text())["rows"]
    assert lazy["step_accuracy"] >= full["step_accuracy"] - 0.01
    assert recent["step_accuracy"] < full["step_accuracy"] - 0.01
    assert lazy["kv_bytes_peak"] <= full["kv_bytes_peak"] / 2


def test_demo_in_eight_bits(call, tmp_path):
    file = tmp_path / "demo.json"
    size = ("--problems", 2, "--steps", 32, "--method", "full", "--method", "lazy-eviction")
    assert call("demo", *size, "--json", file)[0] == 0
    plain = json.loads(file.read_text())["rows"]
    code, out, _ = call("demo", *size, "--kv", "int8", "--json", file)
    assert code == 0 and "K and V in eight bits" in out
    for eight, row in zip(json.loads(file.read_text())["rows"], plain, strict=True):
        assert eight["kv_bytes_peak"] * 4 * 2 * 64 == row["kv_bytes_peak"] * (2 * 64 + 4)
        assert eight["step_accuracy"] >= row["step_accuracy"] - 0.04


@pytest.mark.parametrize("command", [("demo",), ("plan", "reasoner"), ("generate", "reasoner")])
def test_an_unknown_kind_of_k_and_v(call, command):
    more = ("--prompt", "Hi") if command[0] == "generate" else ()
    code, _, err = call(*command, *more, "--kv", "int4")
    assert code == 2 and "--kv: expected one of model, int8, got 'int4'" in err


# --- generate -------------------------------------------------------------------------------------


def test_generate_streams_what_dense_decoding_says(call, monkeypatch):
    tokens = ("--max-new-tokens", PROBLEM.steps * PROBLEM.tokens_per_step)
    wanted = ("generate", "reasoner", "--prompt", PROBLEM.prompt, "--temperature", 0, *tokens)
    code, dense, report = call(*wanted, "--method", "full")
    assert code == 0
    assert len(dense.split()) == PROBLEM.steps * PROBLEM.tokens_per_step
    assert "Full()" in report and "tokens/s" in report
    code, out, report = call(*wanted, "--method", "delta", "--budget", 512)
    assert (code, out) == (0, dense)  # the budget is never exceeded
    assert "Delta(budget=512" in report

    stdin = io.StringIO(PROBLEM.prompt)
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, report = call(
        *("generate", "reasoner", "--prompt", "-", "--budget", 16, *SHORT, *tokens),
        *("--set", "delta_layers=2,4", "--temperature", 1, "--top-p", 0.9, "--seed", 3),
    )
    assert stdin.read() == ""
    assert code == 0 and out.strip()
    assert "delta_layers=(2, 4)" in report


def test_generate_compiles_its_steps_over_a_cache_of_the_length_asked_for(call, monkeypatch):
    """The same tokens as eager steps; here without inductor, which test_static asks."""
    wanted = (*ANSWER, "--temperature", 0, "--max-new-tokens", 9)
    eager = call(*wanted)
    monkeypatch.setattr("kvcomp.hf.compiled.for_generate", compile_config)
    graphs = counters["stats"]["unique_graphs"]
    code, out, report = call(*wanted, "--compile")
    assert (code, out) == eager[:2] == (0, out) and "Full()" in report
    assert counters["stats"]["unique_graphs"] == graphs + 1


def test_the_program_itself_exits_with_2():
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kvcomp", "generate", "nobody/no-such-model", "--prompt", "x"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("kvcomp: error: cannot load model 'nobody/no-such-model': ")
    assert done.stderr.count("\n") == 1


def test_without_arguments_it_helps(call):
    code, out, _ = call()
    assert code == 0
    assert all(command in out for command in ("info", "demo", "generate"))


def test_the_version(call):
    assert call("--version") == (0, f"kvcomp {kvcomp.__version__}\n", "")


@pytest.mark.parametrize("package", ["typer", "rich.console"])
def test_a_missing_package_is_named(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(cli.__file__)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert package.split(".")[0] in err and "kvcomp[hf]" in err and err.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("demo", "--plot", "x.png")
    assert code == 2 and "matplotlib" in err and "kvcomp[bench]" in err


def test_an_answer_ends_where_the_model_has_no_more_positions(call, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(reasoner.path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    given = ("generate", folder, "--method", "full", "--temperature", 0, "--prompt")
    code, out, err = call(*given, PROBLEM.prompt)
    assert code == 0 and out and "the answer ends at the model's last position, 64" in err
    code, out, err = call(*given, f"{PROBLEM.prompt} " * 3)
    assert (code, out) == (2, "")
    assert "--prompt: expected fewer tokens than the 64 positions that the model knows" in err


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(call):
    _, _, err = call("generate", "reasoner", "--prompt", "x", "--method", "louiskv")
    assert err.endswith("got 'louiskv'; did you mean 'louis-kv'?\n")


ANSWER = ("generate", "reasoner", "--method", "full", "--device", "cpu", "--prompt", PROBLEM.prompt)
