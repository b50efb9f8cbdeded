"""Delethink on a real `transformers serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from stand_in import (
    LONG,
    PROBLEMS,
    by_hand,
    chunks_in,
    ids_of,
    outputs,
    problem,
    trace,
    wait_for_chunks,
)

from kvcomp import cli, reasoner
from kvcomp.reasoner import task

pytestmark = pytest.mark.usefixtures("one_thread")


class Server:
    """`transformers serve` with the bundled model, on a port of its own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.output = f"http://127.0.0.1:{self.port}", folder / "serve.log"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", reasoner.path()]
        command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(self.port)]
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | offline
            )
        for _ in range(3000):  # a bound, for machines that have much else to do
            assert self.process.poll() is None, self.output.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        self.kill()
        pytest.fail(f"no server within minutes: {self.output.read_text()[-2000:]}")

    def kill(self):
        self.process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def uninterrupted(server, tokenizer, tmp_path_factory):
    log = tmp_path_factory.mktemp("uninterrupted") / "log.jsonl"
    # A busy server may close a connection that was idle for long.
    return trace(server.url, tokenizer=tokenizer, log=log, retries=3)


def test_a_real_server_says_what_the_loop_on_the_model_says(uninterrupted, tokenizer, generate):
    run = uninterrupted
    assert run.tokens == "text" and "422" in run.reason and "return_token_ids" in run.reason
    assert [found.id for found in run.traces] == ["walk 0", "walk 1"]
    for seed, found in enumerate(run.traces):
        prompt = ids_of(tokenizer, problem(seed).prompt)
        assert found.prompt == prompt
        assert found.output == by_hand(generate, prompt, LONG)
        assert (found.finish, found.chunks, found.drift) == ("budget", 6, 0)
        assert found.longest_context == len(prompt) + LONG.chunk
        assert task.grade(problem(seed), tokenizer.decode(found.output)).step_accuracy == 1


def test_a_server_that_restarts_is_waited_for(server, uninterrupted, tokenizer, tmp_path):
    log = tmp_path / "log.jsonl"
    done = []
    work = threading.Thread(
        target=lambda: done.append(trace(server.url, tokenizer=tokenizer, log=log, retries=40))
    )
    work.start()
    wait_for_chunks(log, 2)
    server.kill()
    left = chunks_in(log)
    server.start()
    work.join(600)
    assert left < 12 and outputs(done[0]) == outputs(uninterrupted)


def test_a_killed_run_goes_on_from_its_log(server, uninterrupted, tmp_path, capsys):
    log, problems, out = (tmp_path / name for name in ("log.jsonl", "problems.jsonl", "out.jsonl"))
    problems.write_text(json.dumps(PROBLEMS[0]) + "\n")
    command = ["delethink", "--url", f"{server.url}/v1", "--model", reasoner.path()]
    command += ["--problems", problems, "--log", log, "--out", out, "--temperature", 0]
    command += ["--chunk", 64, "--carry", 32, "--head", 8, "--max-chunks", 6, "--concurrency", 1]
    command = [str(part) for part in command]
    killed = subprocess.Popen([sys.executable, "-m", "kvcomp", *command], stderr=subprocess.DEVNULL)
    wait_for_chunks(log, 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    finished = chunks_in(log)
    assert 2 <= finished < 6
    with open(log, "ab") as file:
        file.write(b'{"id":"walk 0","sample":0,"chu')  # torn in the middle of a write

    assert cli.main(command) == 0
    report, bar = capsys.readouterr()
    assert f"6, {finished} from the log" in report and "1 by the budget" in report
    assert "traces" in bar and "1/1" in bar
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["output"] == outputs(uninterrupted)[row["id"]]
    assert task.grade(problem(0), row["text"]).final_correct
    assert chunks_in(log) == 6
