"""The stored results: pages show what the files have, and the files say how to make them anew."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "cpu"
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce")


def rows_of(name):
    return json.loads((STORED / f"{name}.json").read_text())["rows"]


def table(page, corner):
    """The rows below the header row that begins with `corner`, by their first cell."""
    lines = page.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(corner))
    cells = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return cells
        name, *rest = (cell.strip(" *") for cell in line.split("|")[1:-1])
        cells[re.sub("`", "", name)] = rest
    return cells


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, RESULTS], ids=lambda page: page.name)
def test_the_demo(page):
    shown = table(page, "| method | steps right |")
    measured = rows_of("demo")
    assert set(shown) == {row["method"] for row in measured}
    for row in measured:
        assert shown[row["method"]] == [
            f"{row['step_accuracy']:.1%}",
            f"{row['final_accuracy']:.0%}",
            f"{row['attended_ratio']:.0%}",
            f"{row['kv_bytes_peak'] / 2**20:.1f} MiB",
            f"{row['kv_bytes_read_per_token'] / 2**10:.0f} KiB",
        ]


@pytest.mark.parametrize("page", [README, RESULTS], ids=lambda page: page.name)
def test_a_decode_step(page):
    names = {
        "transformers, its default cache": "hf dynamic",
        "transformers, StaticCache": "hf static",
    }
    measured = {(row["name"], row["tokens"]): row["ms"] for row in rows_of("decode")}
    shown = table(page, "| tokens seen |")
    for label, cells in shown.items():
        name = names.get(label, label.partition(",")[0])
        for tokens, ms in zip((2048, 8192, 16384, 32768), cells, strict=True):
            assert ms.strip("*") == f"{measured[name, tokens]:.0f}", (label, tokens)
    assert len(shown) == len(measured) / 4


def test_eviction_at_equal_bytes():
    measured = {}
    for row in rows_of("accuracy-tight"):
        measured.setdefault(row["method"], {})[row["bound"]] = f"{row['step_accuracy']:.1%}"
    shown = table(RESULTS, "| tokens a layer may keep |")
    for label, cells in shown.items():
        name = {"raas, its prompt not pinned": "raas, no pin"}.get(label, label)
        if "the better of two" in name:
            both = [measured["h2o"], measured["h2o, recent=window"]]
            best = {bound: max(m[bound] for m in both) for bound in both[0]}
        else:
            best = measured[name]
        assert [cell.strip("*") for cell in cells] == [best[b] for b in (144, 160, 192, 256, 320)]
    assert len(shown) == len(measured) - 3  # full, H2O's second setting, LazyEviction without H2


def test_the_study(reproduce):
    from accuracy.summary import summarize

    found = {(s.method, s.bound): s for s in summarize(rows_of("accuracy-study"))}
    assert found.pop(("full", "1")).steps.mean == 1
    shown = table(RESULTS, "| steps right, % |")
    assert len(found) == 3 * len(shown)
    for label, cells in shown.items():
        name, _, keeps = label.partition(", which keeps ")
        for bound, cell in zip(("1/4", "3/8", "1/2"), cells, strict=True):
            got = found[name, bound]
            assert not got.over and (got.keeps_all if keeps else not got.keeps_all)
            if got.reason is not None:
                assert cell == "–"
                continue
            low, high = 100 * got.steps.low, 100 * got.steps.high
            assert cell == f"{100 * got.steps.mean:.1f} ({low:.0f}–{high:.0f})", (label, bound)
    (pinned,) = summarize(rows_of("accuracy-pinned"))
    assert (pinned.bound, pinned.steps.mean) == ("1/4", 1)


# --- how they were made ---------------------------------------------------------------------------


def test_stored_charts_are_those_that_a_page_shows(reproduce):
    assert {chart.name for chart in STORED.glob("*.png")} == reproduce.shown()


def test_stored_commands_still_mean_something(reproduce):
    results = reproduce.stored()
    assert {f"{name}.json" for name in results} | {"demo.json"} == {
        file.name for file in STORED.glob("*.json")
    }
    for result in results.values():
        script, *options = result.words
        sources = [ROOT / "benchmarks" / script]
        sources += (ROOT / "benchmarks" / script[len("bench_") : -len(".py")]).glob("*.py")
        known = "".join(file.read_text() for file in sources)
        for word in options:
            assert not word.startswith("--") or f'"{word}"' in known, f"{script} has no {word}"


def test_charts_are_drawn_anew(reproduce, tmp_path, monkeypatch, capsys):
    names = ("accuracy-lag", "accuracy-study", "decode")
    for name in names:
        (tmp_path / f"{name}.json").write_bytes((STORED / f"{name}.json").read_bytes())
    monkeypatch.setattr(reproduce, "STORED", tmp_path)
    assert reproduce.main(["--plots"]) == 0
    drawn = {Path(line) for line in capsys.readouterr().out.split()}
    expected = {name for name in reproduce.shown() if name.startswith((*names, "overview"))}
    assert {chart.name for chart in drawn} == expected and len(expected) > 5
    assert all(chart.parent == tmp_path and chart.stat().st_size > 5000 for chart in drawn)


def test_a_result_is_measured_by_its_own_command(reproduce, tmp_path, monkeypatch, capsys):
    """With a script in place of a benchmark, which writes down how it was called."""
    (tmp_path / "bench_it.py").write_text(
        "import json, os, sys\n"
        "facts = {'benchmark': 'it', 'command': 'bench_it.py --part x'}\n"
        "called = {'words': sys.argv[1:], 'isa': os.environ.get('KVCOMP_ISA')}\n"
        "json.dump({'meta': facts, 'rows': [called]}, open(sys.argv[-1], 'w'))\n"
    )
    facts = {"benchmark": "it", "command": "bench_it.py --part x 'a b'"}
    facts["environment"] = {"KVCOMP_ISA": "scalar"}
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "it.json").write_text(json.dumps({"meta": facts, "rows": []}))
    monkeypatch.setattr(reproduce, "STORED", stored)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    assert reproduce.main(["--list"]) == 0
    assert "KVCOMP_ISA=scalar bench_it.py --part x 'a b'" in capsys.readouterr().out
    out = tmp_path / "again"
    assert reproduce.main(["it", "--out", str(out)]) == 0
    (called,) = json.loads((out / "it.json").read_text())["rows"]
    assert called == {
        "words": ["--part", "x", "a b", "--json", str(out / "it.json")],
        "isa": "scalar",
    }
    with pytest.raises(SystemExit):
        reproduce.main(["nothing", "--out", str(out)])
    assert "no stored result nothing" in capsys.readouterr().err
    (tmp_path / "bench_it.py").write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        reproduce.main(["it", "--out", str(out)])
