"""The benchmarks run, write what they promise, and give no speed-up for a wrong result."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from bench_script import BENCHMARKS, script
from harness import record
from kvcomp.ops import OPS

KEYS = {"op", "shape", "dtype", "device", "impl", "ms", "gbps"}


KEYS |= {"ms_min", "ceiling_share", "ratios", "max_error"}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "memory.json"
    assert script("bench_memory").main(["--smoke", "--json", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "decode.json"
    command = ["--smoke", "--part", "step", "generate", "--json", str(path)]
    assert script("bench_decode").main(command) == 0
    return path


@pytest.fixture(scope="module")
def delethink(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "delethink.json"
    assert script("bench_delethink").main(["--smoke", "--json", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "ops.json"
    assert script("bench_ops").main(["--smoke", "--json", str(path)]) == 0
    return path


def test_rows_are_complete_and_finite(smoke):
    content = json.loads(smoke.read_text())
    assert set(content) == {"meta", "rows"}
    for key in ("benchmark", "kvcomp", "torch", "python", "commit", "cpu", "threads", "ceiling"):
        assert key in content["meta"]
    for row in content["rows"]:
        assert set(row) >= KEYS
        numbers = [row["ms"], row["ms_min"], *row["ratios"].values()]
        assert all(math.isfinite(x) and x >= 0 for x in numbers), row
        assert row["correct"]
        if row["gbps"] is not None:
            assert row["gbps"] > 0 and row["ceiling_share"] > 0


def test_every_op_and_implementation_of_the_cpu_has_a_row(smoke):
    rows = json.loads(smoke.read_text())["rows"]
    seen = {(row["op"], row["impl"]) for row in rows}
    for name, op in OPS.items():
        for impl in {"cpu", "reference"} & set(op.impls):
            assert (name, impl) in seen
        assert (name, "probe") in seen and (name, "difference") in seen
    ours = [r for r in rows if r["op"] == "decode_attention" and r["impl"] == "cpu"]
    assert {"sdpa-gqa", "sdpa-repeat-kv", "bmm"} <= set(ours[0]["ratios"])
    assert all("own-dense" in r["ratios"] for r in ours if not r["shape"].endswith("n=256"))
    for op, baselines in {
        "compact_kv": {"gather", "index-select-out"},
        "recurrence_update": {"torch-replay", "torch-each-step"},
        "select_victims": {"topk", "sort"},
    }.items():
        assert all(baselines == set(r["ratios"]) for r in rows if r["op"] == op and is_ours(r))
    layer = {r["impl"]: r for r in rows if r["op"] == "lazy_eviction" and r["dtype"] == "fp32"}
    assert set(layer) == {"decode", "tracked", "replay of 32", "tracked, all", "evict"}
    assert layer["tracked, all"]["overhead"] is not None and "decode" in layer["evict"]["ratios"]


def is_ours(row):
    return row["impl"] == "cpu" and row["shape"] != "overhead"


def test_a_wrong_result_gets_no_ratio(monkeypatch, tmp_path, capsys):
    def wrong(out_a, lse_a, out_b, lse_b):
        return (out_a + out_b) / 2, lse_a

    monkeypatch.setitem(OPS["merge_states"].impls, "cpu", wrong)
    path = tmp_path / "ops.json"
    command = ["--smoke", "--op", "merge_states", "--dtype", "fp32", "bf16", "--json", str(path)]
    assert script("bench_ops").main(command) == 1
    rows = [r for r in json.loads(path.read_text())["rows"] if r["impl"] == "cpu"]
    assert len(rows) == 4 and not any(r["correct"] or r["ratios"] for r in rows)
    printed = [x for x in capsys.readouterr().out.splitlines() if " cpu " in x and "GB/s" in x]
    assert len(printed) == 4 and all("WRONG" in x and "torch-logaddexp" not in x for x in printed)


def test_an_op_that_writes_wrong_tokens_gets_no_ratio(monkeypatch, tmp_path):
    monkeypatch.setitem(OPS["compact_kv"].impls, "cpu", lambda *args: None)
    path = tmp_path / "ops.json"
    command = ["--smoke", "--op", "compact_kv", "--dtype", "fp32", "--json", str(path)]
    assert script("bench_ops").main(command) == 1
    rows = [r for r in json.loads(path.read_text())["rows"] if r["impl"] == "cpu"]
    assert rows and not any(r["correct"] or r["ratios"] for r in rows)


def test_memory_is_flat_where_tokens_leave_and_grows_where_none_do(memory):
    content = json.loads(memory.read_text())
    summaries = content["meta"]["summaries"]
    assert summaries["full"]["slope"] > 0 and summaries["full"]["grows"]
    for name in set(summaries) - {"full"}:
        assert summaries[name]["slope"] == 0 and not summaries[name]["grows"]
        assert 0 < summaries[name]["peak"] < summaries["full"]["peak"] / 5
    for row in content["rows"]:
        assert row["seen"] == 32 + row["tokens"] and row["kept"] <= max(64, row["seen"])
        # Two layers of K and V, 2 heads x 64, bf16: the tensors counted hold at least those.
        assert row["bytes"] >= row["kept"] * 2 * 2 * 2 * 64 * 2


def test_a_method_whose_memory_grows_fails(monkeypatch, capsys):
    module = script("bench_memory")
    hoard = []

    def leak(layer, *args):
        hoard.append(torch.zeros(1000))
        return evict(layer, *args)

    evict = module.METHODS["recency-window"].evict
    monkeypatch.setattr(module.METHODS["recency-window"], "evict", lambda s, x: leak(s, x))
    assert module.main(["--smoke", "--method", "recency-window"]) == 1
    assert "still grows" in capsys.readouterr().err and hoard


def test_accuracy_is_that_of_the_whole_family_at_one_bound(tmp_path):
    module, path = script("bench_families"), tmp_path / "families.json"
    assert module.main(["--smoke", "--part", "tight", "--json", str(path)]) == 0
    full, *rows = json.loads(path.read_text())["rows"]
    assert full["method"] == "full" and full["step_accuracy"] == 1.0
    family = sys.modules["families.members"].family(0.2, 100)
    assert {row["method"] for row in rows} >= set(family) - {
        "raas",  # the prompt does not fit the bound
        "random, prompt pinned",
    }
    assert len({row["bound_bytes"] for row in rows}) == 1
    assert all(row["bound_bytes"] < full["bound_bytes"] for row in rows)
    assert any(row["step_accuracy"] < 1 for row in rows)


def test_retrieval_is_counted_where_it_happens(tmp_path):
    module, path = script("bench_retrieval"), tmp_path / "retrieval.json"
    command = ["--smoke", "--part", "share", "memory", "--dtype", "fp32", "--json", str(path)]
    assert module.main(command) == 0
    rows = json.loads(path.read_text())["rows"]
    share = {r["method"]: r for r in rows if r["part"] == "share"}
    assert share["full"]["link_bytes"] == share["full"]["rate"] == share["full"]["error"] == 0
    louis, every = share["louis-kv"], share["per-token-retrieval"]
    assert 0 < louis["rate"] < 0.25 and every["rate"] == 1 and every["quiet_us"] is None
    assert 0 < louis["link_bytes"] < every["link_bytes"]
    assert louis["recall"] > 0.9 and louis["error"] < 0.2
    assert share["unit_scores + select_units"]["units"] >= 1024 / 16
    prompt, later = (r for r in rows if r["part"] == "memory")
    assert prompt["tokens"] == 1024 and later["tokens"] > 1024 and later["index"] > 0
    for row in (prompt, later):  # the tensors hold what is counted, and spare capacity
        assert row["held"] >= row["slots_allocated"] >= row["slots"] > 0
        assert row["host"] >= row["dense"] / 3  # one layer of three, for the other two keep all


def test_a_step_reads_what_its_method_attends_to(decode):
    rows = json.loads(decode.read_text())["rows"]
    steps = {r["name"]: r for r in rows if r["part"] == "step"}
    stock, token = steps["hf dynamic"], 4 * 2 * 2 * 64 * 2  # layers, K and V, heads x size, bf16
    assert set(steps) == {"hf dynamic", "hf static", *script("bench_decode").OURS}
    assert stock["speedup"] == 1 and stock["rounds"] == 8
    assert 256 < stock["kv_bytes"] / token <= 256 + 16
    assert 256 + 4 <= steps["full"]["kv_bytes"] / token <= 256 + 16  # a mean over its steps
    assert all(steps[x]["kv_bytes"] < steps["full"]["kv_bytes"] for x in ("delta", "louis-kv"))
    assert steps["lazy-eviction"]["kv_bytes"] < steps["full"]["kv_bytes"] / 2
    assert steps["delethink"]["boundary_ms"] > 0 and 0 < steps["louis-kv"]["retrieval_rate"] <= 1
    for row in steps.values():
        parts = [row[f"{part}_ms"] for part in ("attention", "update", "linear", "norm", "rest")]
        assert all(part > 0 for part in parts) and row["ceiling_ms"] > 0
        assert row["weight_bytes"] == stock["weight_bytes"] > 512 * 64 * 2
    generated = {r["name"]: r for r in rows if r["part"] == "generate"}
    assert set(generated) == set(steps)
    assert all(r["generated"] == 8 and r["ms"] > 0 for r in generated.values())


def test_chunks_are_flat_where_dense_attention_grows(delethink):
    content = json.loads(delethink.read_text())
    parts = {}
    for row in content["rows"]:
        parts.setdefault(row["part"], []).append(row)
    for part in ("scaling summary", "curve summary"):
        chunked, dense = parts[part]
        assert (chunked["method"], dense["method"]) == ("delethink", "full")
        assert chunked["peak_growth"] <= 0 < dense["peak_growth"]
        assert chunked["kept_growth"] == 0 < dense["kept_growth"]
    budgets = [r for r in parts["scaling"] if "answers_right" in r]
    assert {r["tokens"] for r in budgets} == set(content["meta"]["budgets"])
    assert all(r["step_accuracy"] == r["answers_right"] == 1 for r in budgets)
    crossed = [r["boundary_s"] > 0 for r in parts["curve"]]
    assert crossed == [False, True, True, False, False, False]
    whole, step, sum_alone = (r["step_accuracy"] for r in parts["sweep"])
    assert whole == step == 1 > sum_alone  # a carry of one token does not say where the walk is
    for row in parts["rotate"]:
        assert 0 < row["kl_mean"] <= row["kl_p99"] <= row["kl_max"]
        assert len(row["kl_by_chunk"]) == row["boundaries"] == 2 and "1" in row["kl_after"]
    kinds = {(r["threads"], r["reset"]): r for r in parts["stall"]}
    cores = len(os.sched_getaffinity(0))
    assert set(kinds) == {(n, x) for n in {1, cores} for x in ("prefill", "streaming")}
    for (threads, reset), row in kinds.items():
        assert row["core_free"] == (threads < cores) and row["boundaries"] == 2
        assert row["peak_bytes"] == kinds[threads, "prefill"]["peak_bytes"] or reset == "streaming"


def test_plots(smoke, memory, decode, delethink, tmp_path):
    pytest.importorskip("matplotlib")
    plot = script("plot")
    pictures = plot.plot(smoke, tmp_path)
    assert {p.stem for p in pictures} >= {
        "ops-decode_attention-bandwidth",
        "ops-decode_attention-speedup",
        "ops-decode_attention-variants",
        "ops-select_pages-speedup",
        "ops-compact_kv-speedup",
        "ops-lazy_eviction-overhead",
    }
    pictures += plot.plot(memory, tmp_path)
    assert pictures[-1].stem == "memory-bytes"
    pictures += plot.plot(BENCHMARKS / "results" / "cpu" / "retrieval" / "share.json", tmp_path)
    assert pictures[-1].stem == "share"
    for part, chart in (("tight", "bytes"), ("lag", "windows")):
        stored = BENCHMARKS / "results" / "cpu" / "families" / f"{part}.json"
        pictures += plot.plot(stored, tmp_path)
        assert pictures[-1].stem == f"{part}-{chart}"
    pictures += plot.plot(decode, tmp_path)
    assert [p.stem for p in pictures[-2:]] == ["decode-tiny-1-times", "decode-tiny-1-parts"]
    charts = plot.plot(delethink, tmp_path)
    names = ("accuracy", "growth", "carries", "boundaries")
    assert [p.stem for p in charts] == [f"delethink-{name}" for name in names]
    pictures += charts
    assert all(1_000 < p.stat().st_size < 100_000 for p in pictures)
    other = tmp_path / "other.json"
    record.write_json(other, {"benchmark": "unheard of"}, [])
    assert plot.main([str(other)]) == 2


def test_the_gpu_script_walks_its_steps_without_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    settings = {"KVCOMP_GPU_DRY": "1", "KVCOMP_GPU_OUT": str(tmp_path), "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", BENCHMARKS / "gpu.sh"], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    steps = {p.stem for p in (tmp_path / "logs").iterdir()}
    measured = {p.stem for p in tmp_path.glob("*.json")}
    assert measured == {"decode", "decode-graph", *(f"ops-{x}" for x in FAMILIES)}
    assert steps == measured | {"versions", "selftest", "op-tests", "plots"}
    rows = [
        r for f in FAMILIES for r in json.loads((tmp_path / f"ops-{f}.json").read_text())["rows"]
    ]
    assert {r["op"] for r in rows} >= set(OPS) and all(r["correct"] for r in rows)
    assert {p.stem for p in tmp_path.glob("*.png")} >= {
        "ops-attention-decode_attention-bandwidth",
        "ops-pages-select_pages-speedup",
        "decode-tiny-1-times",
    }
    assert "ok (" in (tmp_path / "logs" / "selftest.txt").read_text()


FAMILIES = ("attention", "latent", "codes", "pages", "eviction", "retrieval", "overhead")
