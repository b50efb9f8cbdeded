"""reproduce.py measures a stored result anew by its own command, and draws the charts."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from stored_results import ROOT, STORED


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce")


def test_stored_charts_are_those_that_a_page_shows(reproduce):
    charts = {chart.relative_to(STORED).as_posix() for chart in STORED.rglob("*.png")}
    assert charts == reproduce.shown()


def stored_names():
    return sorted(file.relative_to(STORED).as_posix()[:-5] for file in STORED.rglob("*/*.json"))


@pytest.mark.parametrize("name", stored_names())
def test_the_script_still_takes_the_stored_command(reproduce, name):
    result = reproduce.stored()[name]
    options = result.parse()
    given = [word[2:].replace("-", "_") for word in result.words if word.startswith("--")]
    assert set(given) <= set(vars(options)), "an option was read as another one"
    assert (ROOT / "benchmarks" / result.words[0]).stem == f"bench_{Path(name).parent}"


def test_the_index_lists_every_stored_result(reproduce):
    page = reproduce.INDEX.read_text()
    assert page == reproduce.index(), "python benchmarks/reproduce.py --index"
    for name in stored_names():
        assert f"(cpu/{name}.json)" in page


def test_charts_are_drawn_anew(reproduce, tmp_path, monkeypatch, capsys):
    names = ("families/lag", "accuracy/study", "decode/steps", "language/loss-quarter")
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_bytes((STORED / f"{name}.json").read_bytes())
    monkeypatch.setattr(reproduce, "STORED", tmp_path)
    assert reproduce.main(["--plots"]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.split()]
    expected = {name for name in reproduce.shown() if name.startswith((*names, "overview"))}
    assert {chart.relative_to(tmp_path).as_posix() for chart in drawn} == expected
    assert len(expected) > 5 and all(chart.stat().st_size > 5000 for chart in drawn)


@pytest.fixture
def toy(reproduce, tmp_path, monkeypatch):
    """One stored result of a script that only writes down how it was called; and its folder."""
    (tmp_path / "bench_it.py").write_text(
        "import argparse, json, os, sys\n"
        "def parse(argv):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--part', nargs='+')\n"
        "    parser.add_argument('--smoke', action='store_true')\n"
        "    parser.add_argument('--json')\n"
        "    return parser.parse_args(argv)\n"
        "if __name__ == '__main__':\n"
        "    parse(None)\n"
        "    code = int(os.environ.get('IT_EXITS', 0))\n"
        "    facts = {'benchmark': 'it', 'command': 'bench_it.py --part x'}\n"
        "    called = {'words': sys.argv[1:], 'isa': os.environ.get('KVCOMP_ISA')}\n"
        "    if not code:\n"
        "        json.dump({'meta': facts, 'rows': [called]}, open(sys.argv[-1], 'w'))\n"
        "    raise SystemExit(code)\n"
    )
    stored = tmp_path / "stored"
    (stored / "toy").mkdir(parents=True)
    facts = {"benchmark": "it", "command": "bench_it.py --part x 'a b'"}
    facts["environment"] = {"KVCOMP_ISA": "scalar"}
    for name in ("first", "second"):
        (stored / f"toy/{name}.json").write_text(json.dumps({"meta": facts, "rows": []}))
    monkeypatch.setattr(reproduce, "STORED", stored)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_it", raising=False)
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--smoke"]])
def test_a_result_is_measured_by_its_own_command(reproduce, toy, more, capsys):
    assert reproduce.main(["--list"]) == 0
    assert "KVCOMP_ISA=scalar bench_it.py --part x 'a b'" in capsys.readouterr().out
    out = toy / "again"
    assert reproduce.main(["toy/first", "--out", str(out), *more]) == 0
    (called,) = json.loads((out / "toy/first.json").read_text())["rows"]
    assert called == {
        "words": ["--part", "x", "a b", *more, "--json", str(out / "toy/first.json")],
        "isa": "scalar",
    }
    assert not (out / "toy/second.json").exists()
    assert reproduce.main(["toy", "--out", str(out)]) == 0
    assert (out / "toy/second.json").exists()


def test_toy_inputs_make_some_commands_equal(reproduce, toy, capsys):
    out = toy / "again"
    assert reproduce.main(["toy", "--out", str(out), "--smoke"]) == 0
    assert "1 of 1 results measured" in capsys.readouterr().out
    assert (out / "toy/first.json").exists() and not (out / "toy/second.json").exists()


def test_the_stored_commands_with_toy_inputs_cover_every_script_and_setting(reproduce):
    works = {result.work("--smoke"): result for result in reproduce.stored().values()}
    every = {(r.words[0], *r.environment.items()) for r in reproduce.stored().values()}
    assert {(r.words[0], *r.environment.items()) for r in works.values()} == every
    assert len(works) < len(reproduce.stored())


def test_a_result_that_fails_does_not_stop_the_others(reproduce, toy, monkeypatch, capsys):
    facts = {"benchmark": "it", "command": "bench_it.py", "environment": {"IT_EXITS": "7"}}
    (toy / "stored/toy/bad.json").write_text(json.dumps({"meta": facts, "rows": []}))
    facts["environment"] = {"IT_EXITS": str(reproduce.NOT_INSTALLED)}
    (toy / "stored/toy/absent.json").write_text(json.dumps({"meta": facts, "rows": []}))
    assert reproduce.main(["--out", str(toy / "again")]) == 1
    said = capsys.readouterr()
    assert "2 of 4 results measured" in said.out
    assert "FAILED: toy/bad (exit code 7)" in said.err
    assert "left out, a package is missing: toy/absent" in said.err
    assert (toy / "again/toy/second.json").exists()


def test_a_command_that_its_script_refuses_is_found_before_anything_runs(reproduce, toy, capsys):
    facts = {"benchmark": "it", "command": "bench_it.py --gone 4"}
    (toy / "stored/toy/old.json").write_text(json.dumps({"meta": facts, "rows": []}))
    assert reproduce.main(["--out", str(toy / "again")]) == 1
    assert "toy/old: its script refuses bench_it.py --gone 4" in capsys.readouterr().err
    assert not (toy / "again").exists()


def test_an_unknown_result_is_refused(reproduce, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["nothing", "--out", "again"])
    assert "no stored result nothing" in capsys.readouterr().err
