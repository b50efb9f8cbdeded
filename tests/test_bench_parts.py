"""What the benchmarks are made of: turns, steps, sets of data, results in files, command lines."""

import dataclasses
import json
import math
import random
import sys
import time

import pytest
import torch

from bench_script import script
from decode.contenders import STOCK, Filling, contender
from decode.models import make_model
from decode.steps import split
from harness import record, timing
from kvcomp.reasoner import task


def test_steps_on_caches_of_one_size():
    bench = script("bench_decode")
    options = bench.parse(["--smoke", "--part", "graph"])
    options.tokens = [96, 256]
    rows = list(bench.bench_graphs(options))
    names = [(row.tokens, row.name) for row in rows]
    contenders = ("full", "delta", "lazy-eviction", "hf static")
    assert names == [(n, x) for n in (96, 256, "mean") for x in contenders]
    short, long, means = rows[:4], rows[4:8], rows[8:]
    token = short[0].kv_bytes // 97  # of all layers
    for (full, delta, lazy, static), tokens in ((short, 97), (long, 257)):
        assert full.kv_bytes == static.kv_bytes == token * tokens
        assert delta.kv_bytes < full.kv_bytes
        window = tokens // 8  # a quarter of the budget; of a window a half is there, and a token
        assert lazy.kv_bytes == token * (tokens // 2 - window + window // 2 + 1)
        assert 0 < lazy.between_ms < lazy.ms and full.between_ms == 0
    assert means[0].ms == (short[0].ms + long[0].ms) / 2 and means[0].speedup == 1.0
    assert all(row.ms > 0 and not row.in_graph and row.line() for row in rows)


def test_peers_take_turns_in_their_own_processes(tmp_path, capsys):
    bench, file = script("bench_decode"), tmp_path / "peer.json"
    command = ["--smoke", "--part", "peer", "--peer", "vllm=/no/such/python", "--json", str(file)]
    assert bench.main(command) == bench.NOT_INSTALLED
    assert "vllm: skipped: /no/such/python: No such file" in capsys.readouterr().err
    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert set(rows) == {"kvcomp", "kvcomp, int8", "hf dynamic"}
    assert rows["kvcomp"]["kvcomp_ahead"] == 1
    for name, row in rows.items():
        # in bf16 a near tie of the random weights may be decided otherwise
        assert row["agreed"] == 16 if name == "hf dynamic" else row["agreed"] > 8
        assert 0 < row["ms_min"] <= row["ms"] and row["steps"] >= 8
        assert row["attention_ms"] > 0 and row["linear_ms"] > 0 and row["norm_ms"] > 0
    options = bench.parse(command)
    assert bench.begun(options, content["meta"]) == content["rows"]
    assert options.done == {(1, 256)} and list(bench.bench_peer(options)) == []
    with pytest.raises(ValueError, match="from another command"):
        bench.begun(options, {"command": "bench_decode.py --part peer --peer openvino"})


def test_looking_into_a_step_leaves_the_patch_in_place():
    options = script("bench_decode").parse(["--smoke"])
    model = make_model("tiny", torch.bfloat16, "cpu", 0)
    filling = Filling.make(model, 1, 32, 0)
    for name in (STOCK, "full"):
        player = contender(name, model, filling, 8, options)
        before = {m: m.__dict__.get("forward") for m in player.model.modules()}
        assert any(before.values()) == (name == "full")  # linear_rows, norm_rows
        assert split(player, filling, 2)["linear_ms"] > 0
        assert {m: m.__dict__.get("forward") for m in player.model.modules()} == before
        player.close()


def test_an_interrupted_run_of_steps_goes_on(tmp_path):
    bench, file = script("bench_decode"), tmp_path / "steps.json"
    rows = [{"name": n, "batch": 1, "tokens": t} for t in (256, 512) for n in ("full", STOCK)]
    file.write_text(json.dumps({"meta": {"command": "bench_decode.py"}, "rows": rows[:3]}))
    options = bench.parse(["--smoke", "--json", str(file)])
    assert bench.begun(options, {"command": "bench_decode.py"}) == rows[:2]
    assert options.done == {(1, 256)} and list(bench.bench_steps(options)) == []


def test_right_tokens_are_those_of_right_steps():
    script("bench_delethink")
    walks = sys.modules["delethink.walks"]
    problem = task.make_problem(4, 12, 0)
    longer = dataclasses.replace(problem, steps=16)  # a step cut in two makes one more to grade
    words, choice = problem.gold().split(), random.Random(0)
    for wrong in range(len(words)):
        for answer in (
            [*words[:wrong], choice.choice(task.VOCABULARY), *words[wrong + 1 :]],
            words[:wrong] + words[wrong + 1 :],
            [*words[:wrong], "7", *words[wrong:]],
        ):
            marks = walks.right_words(problem, answer)
            grade = task.grade(longer, " ".join(answer))
            assert sum(marks) == 4 * round(grade.step_accuracy * longer.steps), (wrong, answer)


@pytest.mark.parametrize(
    "command, message",
    [
        (["--op", "nothing"], "invalid choice"),
        (["--shape", "32x128"], "expected Hq/HkvxD"),
        (["--tokens", "100"], "multiples of 16"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_a_bad_command_line_says_why(command, message, capsys):
    if command[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="2"):
        script("bench_ops").main(command)
    assert message in capsys.readouterr().err


def test_interleave_bounds_the_slow_and_never_starves_them():
    timings = timing.interleave(
        {"slow": lambda: time.sleep(0.01), "fast": lambda: None}, repeats=20, budget=0.05
    )
    assert timing.LEAST_SAMPLES <= timings["slow"].samples <= 5
    assert timings["fast"].samples == 20
    assert timings["slow"].minimum >= 0.01 > timings["fast"].median


def test_rotation_gives_every_set_to_whoever_asks():
    taken = []
    rotation = timing.Rotation("abc")
    first, second = rotation.calling(taken.append), rotation.calling(taken.append)
    for _ in range(3):
        first()
        second()
    assert "".join(taken) == "abcabc"


def test_lists_of_a_set_are_disjoint_and_cover_everything():
    lists = script("bench_ops").attention._disjoint_lists(2, 3, 40, 10, "cpu")
    assert len(lists) == 4
    everything = torch.cat(lists, dim=-1).sort(-1).values
    assert torch.equal(everything, torch.arange(40).int().expand(2, 3, 40))
    assert all(torch.equal(one, one.sort(-1).values) for one in lists)


@pytest.mark.parametrize("file", (["--json", "x.json"], ["--json=my results/x.json"]))
@pytest.mark.parametrize("place", (0, 2, 4))
def test_a_result_has_every_word_of_its_command_but_the_file(file, place, monkeypatch):
    words = ["--part", "answers", "--kinds", "late 500"]
    monkeypatch.setattr(sys, "argv", ["/a/bench_x.py", *words[:place], *file, *words[place:]])
    assert record.meta("x", "cpu")["command"] == "bench_x.py --part answers --kinds 'late 500'"


def test_a_file_never_holds_nan(tmp_path):
    row = record.Row("op", "shape", "fp32", "cpu", "cpu", ms=math.nan)
    with pytest.raises(ValueError, match="JSON"):
        record.write_json(tmp_path / "x.json", {}, [row])
    assert not (tmp_path / "x.json").exists()


def test_strategies_of_long_reasoning(tmp_path):
    path = tmp_path / "thinking.json"
    bench = script("bench_thinking")
    parts = [name for name in bench.PARTS if name != "stand"]
    assert bench.main(["--smoke", "--part", *parts, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} <= set(parts)
    of = {(row["part"], row["contender"]): row for row in rows}
    assert of["votes", "majority@4"]["tokens_ratio"] == 1
    hints = {name: of["hint", name]["hints"] for name in ("plain", "end", "rewind")}
    assert hints["plain"] == 0 and hints["rewind"]
    assert of["votes", "short-1@4"]["path"] <= of["votes", "short-3@4"]["path"]
    means = [of["stop", f"bias {bias}"]["mean"] for bias in (0, 5, 10, 15, 20)]
    assert means == sorted(means, reverse=True)
    forced = of["stop", "budget 8..16"]
    assert 8 <= forced["shortest"] <= forced["longest"] <= 16
    assert of["follow", "reasoner lead 0"]["led"] == 0
    assert of["follow", "reasoner lead all"]["led"] == 1
    assert 0 < of["follow", "reasoner lead 5"]["led"] < of["follow", "reasoner lead 15"]["led"] < 1
    drafts, chain = of["rounds", "pdr 8, 4, 1"], of["rounds", "sr 3"]
    assert drafts["tokens"] > drafts["path"] and chain["tokens"] == chain["path"]


def test_auc_of_a_signal():
    auc = script("bench_thinking").auc
    assert auc([3, 2, 1], [True, True, False]) == 1 and auc([1, 1], [True, False]) == 0.5
    assert math.isnan(auc([1, 2], [True, True]))
