"""kvcomp think and the strategies of kvcomp generate: files, logs, interrupts, bad input."""

import copy
import importlib
import json
import os
import signal

import pytest
import torch

pytest.importorskip("typer")

import kvcomp
from kvcomp import cli, thinking
from kvcomp.testing.models import tiny_model
from kvcomp.thinking import Chosen, strategies
from toy_words import WORDS, toy_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEMS = [{"id": i, "prompt": f"<bos>w{40 + i}wso", "answer": "7"} for i in range(3)]
FAST = ["--max-new-tokens", "12", "--temperature", "1", "--top-p", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama", num_hidden_layers=2)
    made.generation_config.eos_token_id = WORDS.index("<eos>")
    return made


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in PROBLEMS))
    return str(path)


def think(folder, problems, tmp_path, *more, log="log.jsonl"):
    out = tmp_path / "out.jsonl"
    command = ["think", problems, "--model", folder, "--log", str(tmp_path / log)]
    code = cli.main([*command, "--out", str(out), *FAST, *more])
    return code, [json.loads(x) for x in out.read_text().splitlines()] if out.exists() else None


def test_every_strategy_answers_a_file(folder, problems, tmp_path, capsys):
    options = {
        "majority": ["k=2"],
        "short-m": ["k=3", "m=2"],
        "latent-trajectory": ["k=3", "keep=1", "at=8", "block=4"],
        "pdr": ["drafts=2,1", "workspace=8"],
        "sr": ["rounds=2"],
        "dser": ["chains=2", "iterations=1", "last=1"],
    }
    leading = [name for name, each in strategies.STRATEGIES.items() if each.kind[0] == "r"]
    assert set(options) == set(leading)
    for name, settings in options.items():
        more = [word for each in settings for word in ("--with", f"{name}.{each}")]
        both = ["--strategy", name, "--strategy", "stop-scale", "--with", "stop-scale.bias=3"]
        code, rows = think(folder, problems, tmp_path, *both, *more, log=f"{name}.jsonl")
        assert code == 0, capsys.readouterr().err
        assert [row["id"] for row in rows] == ["0", "1", "2"]
        assert all(row["total_tokens"] >= row["sequential_tokens"] > 0 for row in rows)
    assert "3 problems, 0 of 3 right" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_from_its_log(
    model, folder, problems, tmp_path, capsys, monkeypatch
):
    more = ["--strategy", "short-m", "--with", "short-m.k=3", "--with", "short-m.m=1"]
    _, whole = think(folder, problems, tmp_path, *more, log="whole.jsonl")
    drive, calls = Chosen.drive, []

    def stops(self, *args, **given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drive(self, *args, **given)

    (tmp_path / "out.jsonl").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Chosen, "drive", stops)
        code, rows = think(folder, problems, tmp_path, *more)
    assert (code, rows) == (130, None) and "repeat the command" in capsys.readouterr().err
    log = tmp_path / "log.jsonl"
    assert [json.loads(line).get("id") for line in log.read_text().splitlines()] == [None, "0"]
    with log.open("a") as file:
        file.write('{"id": "1", "ha')  # as a crash leaves it
    assert think(folder, problems, tmp_path, *more) == (0, whole)
    assert len(log.read_text().splitlines()) == 4
    before = log.read_text()
    code, _ = think(folder, problems, tmp_path, *more, "--kv", "int8")
    assert code == 2 and "kv was None and is" in capsys.readouterr().err
    code, _ = think(folder, problems, tmp_path, *more, "--seed", "4")
    assert code == 2 and "seed was 0 and is 4" in capsys.readouterr().err
    assert log.read_text() == before


@pytest.mark.parametrize(
    ("strategy", "signum"),
    [("short-m", signal.SIGINT), ("stand", signal.SIGTERM), ("sr", signal.SIGHUP)],
)
def test_a_signal_leaves_a_whole_log_and_the_model_as_it_was(
    model, folder, problems, tmp_path, capsys, monkeypatch, strategy, signum
):
    """One of the system, in the middle of the second problem."""
    more = ["--strategy", strategy, "--temperature", "0"]
    _, whole = think(folder, problems, tmp_path, *more, log="whole.jsonl")
    (tmp_path / "out.jsonl").unlink()
    command = importlib.import_module("kvcomp.cli.think")  # the package has a function of this name
    monkeypatch.setattr(command, "load", lambda *_: (model, toy_tokenizer()))
    own, forwards, log = model.model.forward, [], tmp_path / "log.jsonl"

    def forward(*args, **given):
        if log.exists() and log.read_text().count("\n") == 2:  # the settings, and one problem
            forwards.append(1)
            if len(forwards) == 3:
                os.kill(os.getpid(), signum)
        return own(*args, **given)

    with monkeypatch.context() as patched:
        patched.setitem(model.model.__dict__, "forward", forward)
        code, rows = think(folder, problems, tmp_path, *more)
        assert (code, rows) == (128 + signum, None)
        assert "repeat the command" in capsys.readouterr().err
        assert model.model.__dict__["forward"] is forward
    assert model.config._attn_implementation != "kvcomp"
    assert [json.loads(line).get("id") for line in log.read_text().splitlines()] == [None, "0"]
    assert think(folder, problems, tmp_path, *more) == (0, whole)


def test_an_interrupt_leaves_the_model_unpatched(model, tmp_path):
    class Stops(torch.nn.Module):
        def __call__(self, ids, scores):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kvcomp.patch(model, kvcomp.Full()) as run:
        thinking.short_m_at_k(
            run, toy_tokenizer(), {"input_ids": torch.tensor([[40, 41]])}, processors=[Stops()]
        )
    assert model.config._attn_implementation != "kvcomp"


def test_generate_takes_strategies_that_act_while_decoding(folder, capsys):
    command = ["generate", folder, "--prompt", "so", "--method", "full", *FAST]
    forced = ["--strategy", "budget-forcing", "--with", "budget-forcing.budget=5"]
    assert cli.main([*command, *forced, "--strategy", "cgrs"]) == 0
    shown = toy_tokenizer()(capsys.readouterr().out.strip())["input_ids"]
    assert WORDS.index("</think>") in shown


@pytest.mark.parametrize(
    ("cls", "name", "fields", "found"),
    [
        (kvcomp.LazyEviction, "lazy-eviction", {"budget": 16}, ("window", "alpha")),
        (kvcomp.LouisKV, "louis-kv", {"budget": 16, "sinks": 4, "local": 4}, ("tau",)),
        (
            kvcomp.Delta,
            "delta",
            {"budget": 16, "page_size": 4, "recent": 1, "warmup": 1},
            ("delta_layers",),
        ),
    ],
)
def test_a_method_calibrated_on_what_a_strategy_writes(
    model, folder, problems, tmp_path, capsys, cls, name, fields, found
):
    more = ["--temperature", "0", "--max-new-tokens", "40", "--strategy", "cgrs"]
    _, rows = think(folder, problems, tmp_path, *more, log="dense.jsonl")
    given = {"answers": [row["text"] for row in rows], "tokenizer": toy_tokenizer()}
    given |= {"num_delta": 1, "every": 4} if cls is kvcomp.Delta else {}
    method = cls.calibrate(model, [each["prompt"] for each in PROBLEMS], **given, **fields)
    values = {field: getattr(method, field) for field in (*fields, *found)}
    words = {
        field: ",".join(map(str, x)) if isinstance(x, tuple) else x for field, x in values.items()
    }
    flags = [word for field, x in words.items() for word in ("--set", f"{field}={x}")]
    more += ["--method", name, *flags, "--strategy", "stand"]
    code, rows = think(folder, problems, tmp_path, *more, log="sparse.jsonl")
    assert code == 0, capsys.readouterr().err
    log = (tmp_path / "sparse.jsonl").read_text().splitlines()
    assert json.loads(log[0])["settings"]["method"] == repr(method)
    with kvcomp.patch(model, method) as run:
        chosen = Chosen(["cgrs", "stand"])
        greedy = {"temperature": 0, "max_new_tokens": 40, "log": tmp_path / "python.jsonl"}
        same = thinking.think(run, toy_tokenizer(), PROBLEMS, chosen, **greedy)
    assert [row["text"] for row in rows] == [each.text for each in same.values()]
    command = ["generate", folder, "--prompt", PROBLEMS[0]["prompt"], "--no-chat", "--temperature"]
    assert cli.main([*command, "0", "--max-new-tokens", "40", *more[6:], "--device", "cpu"]) == 0


BAD = [
    (["--strategy", "hope"], "--strategy: expected one of cgrs,"),
    (["--strategy", "pdr", "--strategy", "dser"], "one at most that leads, got 'pdr and dser'"),
    (["--strategy", "pdr", "--strategy", "pdr"], "each once"),
    (["--strategy", "stand", "--strategy", "short-m"], "one at most that leads"),
    (["--with", "pdr.drafts=1"], "--with pdr.drafts=1: expected --strategy pdr too"),
    (["--with", "pdr"], "--with: expected NAME.OPTION=VALUE"),
    (["--strategy", "sr", "--with", "sr.again=x"], "sr: again: expected a prompt with"),
    (["--strategy", "pdr", "--with", "pdr.mood=1"], "'pdr' has no option 'mood'"),
    (["--strategy", "pdr", "--with", "pdr.drafts=x"], "--with pdr.drafts=x: expected a value"),
    (["--strategy", "short-m", "--with", "short-m.m=9"], "short_m_at_k: m: expected in 1..k=8"),
    (["--strategy", "budget-forcing", "--with", "budget-forcing.budget=-1"], "budget"),
    (["--max-new-tokens", "0"], "max_new_tokens"),
]


@pytest.mark.parametrize(("more", "match"), BAD)
def test_bad_input(folder, problems, tmp_path, capsys, more, match):
    code, rows = think(folder, problems, tmp_path, "--no-progress", *more)
    said = capsys.readouterr().err
    assert (code, rows) == (2, None) and said.startswith("kvcomp: error: ") and match in said
    assert said.count("\n") == 1
    log = tmp_path / "log.jsonl"
    assert not log.exists() or log.read_text() == ""


def test_generate_refuses_what_drives_and_what_is_not_compiled(folder, capsys):
    assert cli.main(["generate", folder, "--prompt", "so", "--strategy", "pdr"]) == 2
    assert "got 'pdr'; use kvcomp think" in capsys.readouterr().err
    stand = ["--strategy", "stand", "--strategy", "cgrs", "--compile"]
    assert cli.main(["generate", folder, "--prompt", "so", *stand]) == 2
    assert "--compile: expected no stand and no cgrs" in capsys.readouterr().err


def test_what_a_later_problem_has_no_room_for_is_said_first(folder, tmp_path, capsys):
    """Of 512 positions the second prompt leaves 4."""
    long = [{"id": 0, "prompt": "so"}, {"id": 1, "ids": [40] * 508}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in long))
    more = ["--strategy", "latent-trajectory", "--with", "latent-trajectory.block=2"]
    more += ["--with", "latent-trajectory.at=5"]
    assert think(folder, str(path), tmp_path, *more) == (2, None)
    said = "problem '1': latent-trajectory.at: expected fewer than the 4 tokens of a row, got 5"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_an_answer_that_cannot_be_compared_is_refused(folder, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"id": 0, "prompt": "so", "answer": [7]}) + "\n")
    assert think(folder, str(path), tmp_path) == (2, None)
    assert "problem number 0: answer: expected text or a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [("total_tokens", "many"), ("votes", {"7": "two"}), ("lengths", 3), ("answer", 7)],
)
def test_a_log_with_a_wrong_field_is_refused(folder, problems, tmp_path, capsys, field, value):
    assert think(folder, problems, tmp_path)[0] == 0
    log = tmp_path / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[2][field] = value
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = log.read_text()
    assert think(folder, problems, tmp_path)[0] == 2
    assert f"line 3 is damaged: {field}: expected" in capsys.readouterr().err
    assert log.read_text() == before


def test_rounds_need_a_text(model, tmp_path):
    found = [{"id": 1, "ids": [40, 41]}]
    said = pytest.raises(ValueError, match="problem '1': expected a prompt, or one message")
    with kvcomp.patch(model, kvcomp.Full()) as run, said:
        thinking.think(run, toy_tokenizer(), found, Chosen(["sr"]), log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("ids", [[40, 10**6], [10**30]])
def test_ids_that_the_model_does_not_know_are_named(model, tmp_path, ids):
    found = [{"id": 1, "ids": [40]}, {"id": 2, "ids": ids}]
    said = pytest.raises(ValueError, match=r"problem '2': expected .* ids below the")
    with kvcomp.patch(model, kvcomp.Full()) as run, said:
        thinking.think(run, toy_tokenizer(), found, Chosen([]), log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_loop_in_place_of_the_one_of_generate(folder, problems, tmp_path, monkeypatch):
    """transformers' own loop as one: the texts are those of one row."""
    plain = strategies.Strategy("loop", lambda: None, lambda run, *_: type(run.model)._sample)
    monkeypatch.setitem(strategies.STRATEGIES, "plain", plain)
    greedy = ["--temperature", "0"]
    code, rows = think(folder, problems, tmp_path, *greedy, "--strategy", "plain", log="a.jsonl")
    _, other = think(folder, problems, tmp_path, *greedy, log="b.jsonl")
    assert code == 0 and [row["text"] for row in rows] == [row["text"] for row in other]
    assert [row["total_tokens"] for row in rows] == [row["total_tokens"] for row in other]
    assert [row["steps"] for row in rows] == [row["steps"] for row in other]


def test_the_models_own_generation_config_asks_for_no_more_than_one_plain_row(
    model, folder, problems, tmp_path, capsys
):
    """Beams, penalties and outputs of steps, as some models on the hub have them."""
    greedy = ["--temperature", "0", "--strategy", "stand"]
    _, plain = think(folder, problems, tmp_path, *greedy, log="a.jsonl")
    other, where = copy.deepcopy(model), str(tmp_path / "model")
    other.generation_config.update(num_beams=3, repetition_penalty=1.5, num_return_sequences=2)
    other.generation_config.update(return_dict_in_generate=True, output_scores=True)
    other.save_pretrained(where)
    toy_tokenizer().save_pretrained(where)
    assert think(where, problems, tmp_path, *greedy, log="b.jsonl") == (0, plain)
    capsys.readouterr()
    command = ["--prompt", "so", "--method", "full", "--max-new-tokens", "12", "--temperature", "0"]
    for more in ([], ["--strategy", "cgrs"], ["--strategy", "stand"]):
        assert cli.main(["generate", where, *command, *more, "--device", "cpu"]) == 0
        shown = capsys.readouterr()
        assert "own num_beams=3 is not used: one answer is streamed" in shown.err
        assert toy_tokenizer()(shown.out.strip())["input_ids"]


def test_speculation_gives_the_answers_of_one_row(folder, problems, tmp_path):
    greedy = ["--temperature", "0", "--method", "lazy-eviction", "--strategy", "cgrs"]
    code, rows = think(folder, problems, tmp_path, *greedy, "--strategy", "stand", log="a.jsonl")
    _, other = think(folder, problems, tmp_path, *greedy, log="b.jsonl")
    assert code == 0 and [row["text"] for row in rows] == [row["text"] for row in other]
    assert all(a["steps"] <= b["steps"] for a, b in zip(rows, other, strict=True))
