"""bench_language.py: methods that read together see what each sees alone, and runs go on."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

import bench_language

from kvcomp import Full, LazyEviction, LouisKV, StreamingLLM
from kvcomp.cli.common import load
from kvcomp.reading import read, windows
from language.questions import KINDS, Writer
from language.stack import Stack

SMALL = ["--model", "reasoner", "--tokens", "64", "--windows", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def reasoner(one_thread):
    return load("reasoner", "cpu", "float32")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCOMP_CACHE", str(tmp_path / "cache"))


def test_together_is_alone(reasoner):
    model, tokenizer = reasoner
    ids = torch.tensor([window.ids for window in windows(tokenizer, 2, 64)])
    methods = [
        Full(),
        LazyEviction(budget=24, window=8, alpha=0.05),
        StreamingLLM(budget=24),
        LouisKV(budget=16, sinks=4, local=8, segment=(2, 4), cluster_size=4),
    ]
    stack = Stack(model, methods)
    before = model.config._attn_implementation
    found = stack.read(ids, 16, lambda: None)
    assert model.config._attn_implementation == before
    for method, hidden, report in zip(methods, found, stack.reports(), strict=True):
        expected, alone = read(model, method, ids, 16)
        torch.testing.assert_close(hidden, expected, atol=2e-3, rtol=1e-3)
        for name in ("tokens_attended", "kv_bytes_peak", "tracking_bytes_peak", "retrievals"):
            assert getattr(report, name) == getattr(alone, name), (method, name)


@pytest.mark.parametrize("part", ["loss", "premises"])
def test_a_run_goes_on_where_it_stopped(part, tmp_path, capsys):
    file = tmp_path / "rows.json"
    args = ["--part", part, *SMALL, "--budgets", "3/4", "--json", str(file)]
    args += ["--methods", "full", "lazy-eviction", "--stack", "1"]
    assert bench_language.main([*args, "--cells", "1"]) == 0
    first = json.loads(file.read_text())["rows"]
    assert bench_language.main(args) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(first) == 1 and len(rows) == 2 and rows[0] == first[0]
    said = capsys.readouterr().out
    assert bench_language.main(args) == 0  # nothing is left, and the tables are the same
    again = capsys.readouterr().out
    last = said.splitlines()[-1]
    assert re.search(r"\d", last) and again.splitlines()[-1] == last
    assert bench_language.main([*args, "--tokens", "80"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_questions_end_with_their_answer(reasoner):
    writer = Writer(reasoner[1])
    for kind in KINDS:
        for place in range(2):
            question = writer.write(kind, place, 2, 1600)
            assert len(question.ids) == 1600 and 0 < question.answer < 50
            answer = question.ids[-question.answer :]
            earlier = question.ids[: -question.answer]
            starts = range(len(earlier) - len(answer))
            assert any(earlier[i : i + len(answer)] == answer for i in starts), kind


def test_methods_that_are_none_are_named(capsys):
    assert bench_language.main([*SMALL, "--methods", "nothing"]) == 2
    assert "got 'nothing'" in capsys.readouterr().err
    assert bench_language.main([*SMALL, "--methods", "delta:nothing=1"]) == 2
    assert "delta has no field 'nothing'" in capsys.readouterr().err
