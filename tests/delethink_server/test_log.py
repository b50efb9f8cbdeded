"""The log of finished chunks."""

import resource
import subprocess
import sys

import pytest
from stand_in import PROBLEMS, chunks_in

import kvcomp
from kvcomp import Delethink

pytestmark = pytest.mark.usefixtures("one_thread")


def test_another_runs_log_is_refused(run, engine, tmp_path):
    run()
    before, asked = (tmp_path / "log.jsonl").read_bytes(), len(engine.requests)
    other = kvcomp.delethink.Sampling(temperature=0.6)
    changed = [
        ({"sampling": other}, "temperature was 0 and is 0.6"),
        ({"model": "other"}, "model was .* and is 'other'"),
        ({"method": Delethink(chunk=9, carry=4, head=2)}, "chunk was 8 and is 9"),
        ({"problems": [{"id": "walk 0", "prompt": "from ba sum 1"}]}, "prompt of problem 'walk 0'"),
    ]
    for options, named in changed:
        with pytest.raises(ValueError, match=named):
            run(**options)
    assert (tmp_path / "log.jsonl").read_bytes() == before and len(engine.requests) == asked


def test_a_log_has_one_writer(run, tmp_path):
    code = (
        "import fcntl, sys; log = open(sys.argv[1], 'a'); fcntl.flock(log, fcntl.LOCK_EX);"
        "print(flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "log.jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()  # it has the lock
    with pytest.raises(ValueError, match="another process is writing to"):
        run()
    other.communicate(b"\n", timeout=30)
    assert len(run().traces) == 2


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_line_is_dropped(run, engine, tmp_path, cut):
    log = tmp_path / "log.jsonl"
    whole = run(PROBLEMS[:1])
    log.write_bytes(log.read_bytes()[:-cut])
    left = chunks_in(log)
    again = run(PROBLEMS[:1])
    assert left < 3 and again.resumed == left and again.traces == whole.traces
    assert chunks_in(log) == 3


@pytest.mark.parametrize("content", ["hello", "hello\n", '{"id": "a", "prompt": "b"}\n'])
def test_a_file_that_is_no_log_is_left_alone(run, tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(ValueError, match="not a log of Delethink"):
        run()
    assert log.read_text() == content


def test_a_damaged_log_is_refused(run, engine, tmp_path):
    run()
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for damage in (
        lines[:1] + lines[2:],
        [*lines[:2], b"{}\n", *lines[2:]],
        [b'{"kvcomp.deleth\n'],
    ):
        log.write_bytes(b"".join(damage))
        with pytest.raises(ValueError, match=r"log\.jsonl, line \d+ is damaged|not a log"):
            run()
        assert log.read_bytes() == b"".join(damage)


def test_a_full_disk_is_an_error_and_not_a_torn_log(run, engine, tmp_path):
    log = tmp_path / "log.jsonl"
    whole = run(method=Delethink(chunk=8, carry=4, head=2, max_chunks=2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 40, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"cannot write .*log\.jsonl: 40 of \d+ bytes"):
            run(concurrency=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.stat().st_size > 40 and chunks_in(log) == 4
    assert run().resumed == 4 and whole.resumed == 0 and chunks_in(log) == 6
