"""The command line where a stream is full or closed, a reader leaves, or a signal stops it."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")


import kvcomp
import kvcomp.demo
from kvcomp import cli
from kvcomp.cli.stopping import Stopped, run_async, signals_raise
from kvcomp.reasoner import task

PROBLEM = task.make_problem(nodes=4, steps=8, seed=1)


FULL = "No space left on device"
DEMO = ("demo", "--problems", 1, "--steps", 8, "--nodes", 4, "--method", "full", "--device", "cpu")
ANSWER = ("generate", "reasoner", "--method", "full", "--device", "cpu", "--prompt", PROBLEM.prompt)
PLAN = ("plan", "reasoner", "--device", "h200")


def program(*args, **options):
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvcomp", *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def last_line(text):
    return text.splitlines()[-1]


@pytest.fixture
def call_in_vain(capsys, monkeypatch):
    """Run a command line whose standard output is on a full disk: exit code, standard error."""

    def run(*args):
        with open("/dev/full", "w") as full, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", full)
            code = cli.main([str(arg) for arg in args])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("done", [0, 2])
def test_an_interrupted_demo_shows_the_methods_that_are_done(call, tmp_path, monkeypatch, done):
    decode, started, file = kvcomp.demo.Workload.decode, [], tmp_path / "demo.json"

    def stopping(*args):
        if len(started) == done:
            raise KeyboardInterrupt
        started.append(args)
        return decode(*args)

    monkeypatch.setattr("kvcomp.demo.Workload.decode", stopping)
    names = "full", "delta", "lazy-eviction"
    more = [word for name in names[1:] for word in ("--method", name)]
    code, out, err = call(*DEMO, *more, "--json", file)
    assert code == 130 and last_line(err) == f"kvcomp: stopped with {done} of 3 methods done"
    assert file.exists() == bool(done) and [name in out for name in names] == [done > 0] * 2 + [
        False
    ]
    if done:
        assert [row["method"] for row in json.loads(file.read_text())["rows"]] == [*names[:done]]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_what_runs_in_an_event_loop_and_raises_behind_it(signum):
    """Raised at once, it would end whatever task or callback it met."""
    ends = []

    async def part():
        try:
            os.kill(os.getpid(), signum)
            ends.append("not in the middle of a task")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ends.append("cleaned up")

    async def work():
        await asyncio.gather(asyncio.create_task(part()))

    with signals_raise():
        with pytest.raises(Stopped) as stopped:
            run_async(work())
        assert ends == ["not in the middle of a task", "cleaned up"]
        assert stopped.value.exit_code == 128 + signum
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is signal.SIG_DFL


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_costs_nothing_else(call, tmp_path, option):
    pytest.importorskip("matplotlib")
    other, file = {"--json": "--plot", "--plot": "--json"}[option], tmp_path / "other"
    code, out, err = call(*DEMO, option, "/dev/full", other, file)
    assert code == 2 and "steps" in out and "\nfull " in out
    assert last_line(err) == f"kvcomp: error: cannot write '/dev/full': {FULL}"
    assert file.stat().st_size > 0


def test_a_place_that_cannot_be_written_is_found_before_the_work(call, tmp_path, monkeypatch):
    monkeypatch.setattr("kvcomp.demo.run", None)  # it would be called
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    for place in (tmp_path / "no" / "x.json", tmp_path, kept / "x.json", "/proc/x.json"):
        code, out, err = call(*DEMO, "--json", kept, "--plot", place)
        assert (code, out) == (2, "") and err.startswith(f"kvcomp: error: cannot write '{place}': ")
    assert kept.read_text() == "{}" and list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize(
    "args",
    [DEMO, PLAN, (*PLAN, "--json"), ("info",), ("info", "--json"), ("--version",), ("--help",)],
    ids=str,
)
def test_a_full_standard_output_is_one_line(call_in_vain, args):
    code, err = call_in_vain(*args)
    assert code == 2 and "Traceback" not in err
    assert last_line(err) == f"kvcomp: error: cannot write standard output: {FULL}"


def test_a_full_standard_output_does_not_cost_the_files(call_in_vain, tmp_path):
    file = tmp_path / "demo.json"
    assert call_in_vain(*DEMO, "--json", file)[0] == 2
    assert json.loads(file.read_text())["rows"][0]["method"] == "full"


def test_a_full_standard_output_does_not_cost_the_report(call_in_vain):
    code, err = call_in_vain(*ANSWER, "--max-new-tokens", 8)
    report, _, error = err.rpartition("kvcomp: error: ")
    assert code == 2 and report.startswith("Full()")
    assert error == f"cannot write standard output: {FULL}\n"


def test_a_reader_that_leaves_is_no_error():
    """`kvcomp plan ... | head -1`: no traceback, and no complaint when Python exits."""
    process = program(*PLAN, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 141


def test_a_reader_that_leaves_stops_the_answer_and_gets_the_report():
    process = program(*ANSWER, "--max-new-tokens", 3500, stdout=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    err = process.communicate(timeout=120)[1]
    assert err.startswith("Full()") and "Traceback" not in err and process.returncode == 141


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream(closed):
    shell = f'exec "$@" {closed}>&-'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "kvcomp", *map(str, PLAN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if closed == 1:
        assert (done.returncode, done.stderr) == (2, "kvcomp: error: standard output is closed\n")
    else:
        assert done.returncode == 0 and "lazy-eviction" in done.stdout


def test_a_closed_standard_input():
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "kvcomp"]
    command += ["generate", "reasoner", "--prompt", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kvcomp: error: --prompt: standard input is closed\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_answer_ends_with_its_report(signum):
    process = program(*ANSWER, "--max-new-tokens", 3500, stdout=subprocess.PIPE)
    begun = process.stdout.read(1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert begun and out.endswith("\n")
    assert err.startswith("Full()") and "tokens/s" in err and "Traceback" not in err


def test_a_progress_bar_that_cannot_be_shown_costs_nothing(call, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", full)
        patched.setenv("FORCE_COLOR", "1")  # a bar as on a terminal
        code, out, _ = call(*DEMO)
        cli.silence(full)
    assert code == 0 and "\nfull " in out


def test_what_a_terminal_cannot_show_is_replaced(capsys, monkeypatch):
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    monkeypatch.setattr(cli, "__version__", "1\u00e9")
    assert cli.main(["--version"]) == 0
    assert data.getvalue() == b"kvcomp 1?\n"
