"""The accuracy study: equal bytes are measured, a run goes on, intervals are right."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("openai")

from transformers import AutoTokenizer

from accuracy import options as command_line
from accuracy.intervals import bootstrap, wilson
from accuracy.sizes import Room, fit, held_bytes, keeps_all
from accuracy.study import Study
from accuracy.summary import summarize
from kvcomp import METHODS, reasoner
from kvcomp.cache import KVCache
from kvcomp.methods.cost import Place
from kvcomp.testing.models import tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--device", "cpu", "--nodes", "4", "--steps", "24", "--count", "2", "--alpha", "0.2"]


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(*more):
    return Study(command_line.parse([*TINY, *more], ""))


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every registered method at one bound."""
    path = tmp_path_factory.mktemp("study") / "accuracy-study.json"
    command = [*TINY, "--seeds", "1", "--budgets", "9/10", "--json", str(path)]
    assert script("bench_accuracy").main(command) == 0
    return path


def test_every_method_stays_under_its_bound(everything):
    content = json.loads(everything.read_text())
    whole = content["meta"]["context_bytes"]
    rows = {row["method"]: row for row in content["rows"]}
    assert set(rows) == set(METHODS)
    assert rows["full"]["peak_bytes"] == whole and rows["full"]["steps"] == [1, 1]
    for row in rows.values():
        assert row["reason"] is None and not row["over"], row
        assert row["peak_bytes"] >= row["tracking_bytes"] >= 0
        if row["keeps_all"]:
            assert row["peak_bytes"] >= whole
        else:
            assert 0.5 * row["bound_bytes"] < row["peak_bytes"] <= row["bound_bytes"] < whole
        assert len(row["steps"]) == len(row["right"]) == len(row["problems"]) == 2
        assert row["generated"] == [4 * 24] * 2 and 0 < row["attended"] <= 1
    kept = {name for name, row in rows.items() if row["keeps_all"]}
    assert kept == {"full", "delta", "tidal-decode", "less-is-more", "random-pages"}
    host = {name for name, row in rows.items() if row["host_bytes"]}
    assert {"louis-kv", "quest", "arkvale"} <= host and not host & kept
    trace = rows["lazy-eviction"]["trace"]
    assert trace[0][0] == 1 and len(trace) > 10
    assert max(held for _, held in trace) <= rows["lazy-eviction"]["bound_bytes"]


def test_a_bound_that_is_too_small_is_a_row_with_the_reason():
    names = ("full", "h2o", "louis-kv", "delethink", "delta")
    found = study("--methods", *names, "--budgets", "8", "--seeds", "1", "--steps", "8")
    found.run()
    rows = {row["method"]: row for row in found.store.rows}
    assert set(rows) == set(names)
    for name in ("h2o", "louis-kv", "delethink"):
        assert rows[name]["reason"] and "right" not in rows[name]
    assert "prompt" in rows["delethink"]["reason"] and rows["delta"]["reason"] is None
    found = {summary.method: summary for summary in found.summaries()}
    assert found["h2o"].reason == rows["h2o"]["reason"] and found["h2o"].reason in found[
        "h2o"
    ].line(1)
    assert found["delta"].attended < 0.8 and found["delta"].keeps_all


@pytest.mark.parametrize("name", sorted(METHODS))
def test_sizes_of_a_longer_context(name):
    place = Place(700, 60, 4, 4, 2, 64, 4)
    room = Room("any", place, torch.float32, torch.device("cpu"))
    bound = room.context_bytes * 3 // 4
    method = fit(name, bound, room, {})
    if not keeps_all(method):
        assert 0.85 * bound < held_bytes(method, room) <= bound
    elif name != "full":
        page = getattr(method, "page_size", 1)
        assert method.budget == bound // room.token_bytes // page * page


@pytest.mark.parametrize("name", ["louis-kv", "stride-retrieval"])
def test_a_bound_holds_all_that_retrieval_may_have_on_the_device(name):
    """Not only what random keys bring there: their units rarely fill the budget."""
    place = Place(300, 40, 1, 2, 2, 64, 4)
    room = Room("any", place, torch.float32, torch.device("cpu"))
    bound = room.context_bytes // 2
    method = fit(name, bound, room, {"dense_layers": 0})
    cache = KVCache(method, 1)
    layer, prompt = cache.layers[0], torch.randn(1, 2, 40, 64)
    layer.append(prompt, prompt)
    cache.prefill(layer, prompt, 0.125)
    for _ in range(260):
        k = torch.randn(1, 2, 1, 64)
        layer.append(k, k)
        cache.attend(layer, torch.randn(1, 2, 64), 0.125)
    most = method.most_resident * place.token_bytes
    assert cache.meter.peak_bytes <= most
    assert 0.8 * bound < most + cache.meter.peak_note_bytes <= bound


@pytest.mark.parametrize("name", ["lazy-eviction", "louis-kv", "delethink"])
def test_eight_bits_hold_more_tokens_in_the_same_bytes(name):
    place = Place(600, 60, 4, 4, 2, 64, 2)
    room = Room("any", place, torch.bfloat16, torch.device("cpu"))
    coded = room.keeping("int8")
    bound = room.context_bytes // (2 if name == "louis-kv" else 4)
    plain, more = fit(name, bound, room, {}), fit(name, bound, coded, {})
    assert held_bytes(more, coded) <= bound
    size = "chunk" if name == "delethink" else "budget"
    assert getattr(more, size) > 1.5 * getattr(plain, size)


def test_own_fields_win_and_the_budget_follows_them():
    room = Room("any", Place(400, 60, 4, 4, 2, 64, 4), torch.float32, torch.device("cpu"))
    bound = room.context_bytes // 2
    lazy = fit("lazy-eviction", bound, room, {"window": 8, "alpha": 0.01})
    assert (lazy.window, lazy.alpha) == (8, 0.01)
    assert 0.9 * bound < held_bytes(lazy, room) <= bound
    delta = fit("delta", bound, room, {"page_size": 16})
    assert delta.page_size == 16 and delta.budget % 16 == 0
    assert fit("quest", bound * 3 // 2, room, {"page_size": 8}).page_size == 8


def test_a_run_that_stopped_goes_on_where_it_was(tmp_path, capsys):
    path = tmp_path / "study.json"
    command = ["--methods", "full", "tova", "--budgets", "1/2", "--seeds", "2", "--batch", "1"]
    command = [*TINY, *command, "--json", str(path)]
    main = script("bench_accuracy").main
    assert main([*command, "--cells", "3"]) == 0
    first = rows_of(path)
    assert len(first) == 3 and not path.with_name("study.json.part").exists()
    assert main(command) == 0
    rows = rows_of(path)
    assert len(rows) == 2 * 2 * 2 and rows[:3] == first
    assert "8 cells, 3 of them done" in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    assert main(command) == 0  # nothing is left
    assert main([*command, "--methods", "full"]) == 0  # nor of these
    assert path.stat().st_mtime_ns == before
    assert len({tuple(row["problems"]) for row in rows}) == 4  # other walks with each seed


def test_a_run_with_other_settings_is_refused(tmp_path, capsys):
    path = tmp_path / "study.json"
    command = [*TINY, "--methods", "full", "--seeds", "1", "--json", str(path)]
    main = script("bench_accuracy").main
    assert main(command) == 0
    before = path.read_text()
    for other in (["--steps", "16"], ["--alpha", "0.1"], ["--temperature", "1"]):
        assert main([*command, *other]) == 2
        name = other[0].removeprefix("--")
        assert f"{name} was" in capsys.readouterr().err
    path.write_text('{"meta": {"benchmark": "ops"}, "rows": []}')
    assert main(command) == 2 and "something else" in capsys.readouterr().err
    path.write_text(before[: len(before) // 2])
    assert main(command) == 2 and "something else" in capsys.readouterr().err
    assert path.read_text() == before[: len(before) // 2]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--budgets", "0"], "--budgets: expected shares"),
        (["--budgets", "3/2"], "--budgets: expected shares"),
        (["--budgets", "half"], "--budgets: expected shares"),
        (["--set", "h2o.sinks=2"], "h2o has no field 'sinks'"),
        (["--set", "nothing.sinks=2"], "expected METHOD.FIELD=VALUE"),
        (["--set", "h2o.window=many"], "expected a value of type int"),
        (["--model", "other"], "expected a file, as only the reasoner has its own"),
        (["--preset", "delta-aime24"], "needs AIME 2024"),
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--json", "/nowhere/at/all.json"], "cannot write"),
        (["--problems", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_bad_command_line_says_why(more, message, capsys):
    assert script("bench_accuracy").main([*TINY, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the reasoner's tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    tokenizer.save_pretrained(path)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(100, 160))
    model.save_pretrained(path)
    return path


def test_any_model_and_any_problems(folder, tmp_path):
    problems, path = tmp_path / "problems.jsonl", tmp_path / "study.json"
    lines = [
        {"id": "a", "prompt": "ba 3 ke 4 from ba sum", "answer": "4", "checker": "exact"},
        {"id": "b", "ids": list(range(6, 40)), "answer": "ba", "checker": "exact"},
        {"id": "c", "prompt": "from ba sum 2", "answer": "B", "checker": "choice"},
    ]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--model", str(folder), "--problems", str(problems), "--max-new-tokens", "24"]
    command += ["--device", "cpu", "--batch", "2", "--seeds", "2", "--temperature", "1"]
    command += ["--methods", "full", "h2o", "louis-kv", "delethink", "--budgets", "7/8"]
    assert script("bench_accuracy").main([*command, "--json", str(path)]) == 0
    rows = rows_of(path)
    assert len(rows) == 4 * 2 * 2
    full = [row for row in rows if row["method"] == "full"]
    assert [row["problems"] for row in full] == [["a", "b"], ["c"]] * 2
    assert full[0]["prompts"] == [8, 34] and full[0]["generated"] != full[2]["generated"]
    generated = [n for row in full for n in row["generated"]]
    assert 1 <= min(generated) < max(generated) <= 24
    done = [row for row in rows if row["reason"] is None]
    assert {"full", "h2o"} <= {row["method"] for row in done}
    assert all(row["steps"] == [None] * len(row["problems"]) for row in done)
    summary = summarize(rows)[0]
    assert summary.steps is None and summary.answers.mean == summary.score.mean
    assert summary.problems == 6


def test_wilson_is_as_published():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_mean_of_problems():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap(values.tolist())
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.003)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.003)
    assert bootstrap(values.tolist()) == (low, high) and bootstrap([0.5]) == (0.5, 0.5)


def test_samples_of_a_problem_are_one_value_and_answers_count_each():
    row = {
        **{"method": "full", "baseline": True, "bound": "1", "bound_bytes": None, "reason": None},
        **{
            "published": None,
            "keeps_all": True,
            "over": False,
            "peak_bytes": 5,
            "host_bytes": 0,
            "attended": 1.0,
        },
        **{"link_bytes": 0.0, "seconds": 1.0, "problems": ["a", "b"], "generated": [4, 4]},
        **{"right": [True, False], "steps": [1.0, 0.5], "first_visits": [None, 0.5]},
    }
    again = row | {"right": [False, False], "steps": [0.0, 0.5], "peak_bytes": 7}
    (summary,) = summarize([row, again])
    assert summary.steps.mean == 0.5 and summary.steps.low == summary.steps.high == 0.5
    assert summary.first_visits == 0.5 and summary.peak_bytes == 7
    assert summary.answers.mean == 0.25
    assert (summary.answers.low, summary.answers.high) == wilson(1, 4)


def test_a_cell_over_its_bound_is_marked(tmp_path, monkeypatch):
    from accuracy import study as module

    monkeypatch.setattr(module, "ROUNDING", 0.5)
    found = study("--methods", "tova", "--budgets", "1/2", "--seeds", "1")
    found.run()
    (summary,) = found.summaries()
    assert summary.over and "OVER" in summary.line(1)


def test_a_preset_runs_its_methods(folder, tmp_path, monkeypatch):
    from dataclasses import replace

    import kvcomp
    from accuracy import study, workload
    from evaluation import published

    preset = replace(
        published.PRESETS["lazy-eviction-gsm8k"],
        data=replace(published.GSM8K, checker="exact"),
        sampling=published.Sampling(max_new_tokens=24),
        budgets={str(folder): (0.5, 32)},
        rows={"h2o": lambda _, budget: kvcomp.H2O(budget=budget)},
        published={str(folder): {"h2o 32": "about 50"}},
        dtype="float32",
    )
    for module in (command_line, study, workload):
        monkeypatch.setattr(module, "PRESETS", {**published.PRESETS, preset.name: preset})
    problems, path = tmp_path / "problems.jsonl", tmp_path / "study.json"
    problems.write_text(json.dumps({"id": "a", "ids": list(range(6, 46)), "answer": "1"}))
    command = ["--preset", preset.name, "--problems", str(problems), "--json", str(path)]
    found = study.Study(command_line.parse(command, ""))
    found.run()
    full, half, fixed = found.store.rows
    assert full["method"] == "full" and full["generated"][0] <= 24 and full["reason"] is None
    assert half["method"] == "h2o 50%" and fixed["method"] == "h2o 32"
    assert f"budget={round((40 + full['generated'][0]) / 2)}," in half["parameters"]
    assert "budget=32," in fixed["parameters"] and not fixed["over"]
    assert "published about 50" in found.summaries()[2].line(1)


def test_charts_of_a_study(everything, tmp_path):
    pytest.importorskip("matplotlib")
    written = script("plot").plot(everything, tmp_path)
    names = ("bytes", "attended", "memory")
    assert [path.stem for path in written] == [f"accuracy-study-{name}" for name in names]
    assert all(1_000 < path.stat().st_size < 200_000 for path in written)
