"""The command line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import PROBLEMS, chunks_in, wait_for_chunks

from kvcomp import cli, reasoner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_server_that_is_not_there_gets_one_line(capsys, tmp_path):
    Path("problems.jsonl").write_text(json.dumps(PROBLEMS[0]) + "\n")
    url = ("--url", "http://127.0.0.1:1/v1", "--model", "served", "--tokenizer", "reasoner")
    files = ("--problems", "problems.jsonl", "--log", "log.jsonl", "--retries", "0")
    assert cli.main(["delethink", *url, *files]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("kvcomp: error: delethink: cannot reach http://127.0.0.1:1/v1")


def test_openai_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    options = ("--url", "http://x", "--model", "m", "--problems", "p", "--log", "l")
    assert cli.main(["delethink", *options]) == 2
    message = "kvcomp: error: this needs openai: pip install 'kvcomp[delethink]'\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_command_says_that_it_can_be_resumed(engine, tmp_path, signum):
    log, problems = tmp_path / "log.jsonl", tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(each) + "\n" for each in PROBLEMS))
    command = ["delethink", "--url", f"{engine.url}/v1", "--model", reasoner.path()]
    command += ["--problems", problems, "--log", log, "--temperature", 0, "--concurrency", 1]
    command += ["--chunk", 8, "--carry", 4, "--head", 2, "--max-chunks", 3, "--no-progress"]
    command = [str(part) for part in command]
    engine.twist = hold_from(engine, 4)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcomp", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_chunks(log, 2, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signum, "")
    assert err == f"kvcomp: stopped; finished chunks are in {log}: repeat the command to resume\n"
    assert chunks_in(log) == 2
    engine.twist = lambda request, answer: answer
    assert cli.main(command) == 0 and chunks_in(log) == 6


def hold_from(engine, count):
    """Answer fewer requests than `count`, the first of which tests the server."""

    def twist(request, answer):
        if len(engine.requests) >= count:
            time.sleep(5)
        return answer

    return twist


def test_traces_that_cannot_be_written_are_reported(engine, capsys, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps(PROBLEMS[0]) + "\n")
    command = ["delethink", "--url", f"{engine.url}/v1", "--model", reasoner.path()]
    command += ["--problems", problems, "--log", tmp_path / "log.jsonl", "--out", "/dev/full"]
    command += ["--chunk", 8, "--carry", 4, "--head", 2, "--max-chunks", 3, "--no-progress"]
    assert cli.main([str(part) for part in command]) == 2
    out, err = capsys.readouterr()
    assert "1 by the budget" in out
    assert err == "kvcomp: error: cannot write '/dev/full': No space left on device\n"
