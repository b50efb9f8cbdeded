"""Servers that answer badly, late or not at all."""

import socket
import time

import pytest
from stand_in import PROBLEMS, SHORT, by_hand, chunks_in, trace

import kvcomp

pytestmark = pytest.mark.usefixtures("one_thread")


def instead(status, body):
    return lambda request, answer: (status, body)


def change(**fields):
    def twist(request, answer):
        answer["choices"][0] |= fields
        return answer

    return twist


@pytest.mark.parametrize(
    "twist, named",
    [
        (instead(401, {"error": {"message": "no such key"}}), "HTTP 401.*no such key"),
        (instead(404, {"error": {"message": "no model x"}}), "HTTP 404.*no model x"),
        (instead(400, {"error": {"message": "not today"}}), "HTTP 400.*not today"),
        (instead(503, "busy"), "HTTP 503: busy"),
        (instead(200, {"hello": "world"}), "no completion"),
        (instead(200, {"choices": []}), "0 choices"),
        (instead(200, {"choices": ["x"]}), "finish_reason"),
        (instead(200, "<html>hello</html>"), "no completion"),
        (change(finish_reason="abort"), "abort"),
        (change(finish_reason=None), "None"),
    ],
)
def test_a_server_that_answers_badly(run, engine, tmp_path, twist, named):
    engine.twist = twist
    with pytest.raises(kvcomp.delethink.EngineError, match=f"kvcomp.delethink: .*{named}"):
        run()
    assert chunks_in(tmp_path / "log.jsonl") == 0
    engine.twist = lambda request, answer: answer
    assert len(run().traces) == 2  # nothing is in the way of another attempt


def test_a_server_that_is_down(tokenizer, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(kvcomp.delethink.EngineError, match=f"cannot reach {url}"):
            trace(url, tokenizer=tokenizer, log=tmp_path / "log.jsonl")


def test_a_server_that_is_slow(run, engine):
    engine.twist = lambda request, answer: time.sleep(1.5) or answer
    with pytest.raises(kvcomp.delethink.EngineError, match=r"time-out, 0\.3"):
        run(timeout=0.3)


def test_one_bad_problem_costs_the_others_nothing(run, engine, tokenizer, generate, tmp_path):
    long = {"id": "long", "prompt": " ".join([PROBLEMS[0]["prompt"]] * 2)}
    engine.max_model_len = 50
    with pytest.raises(kvcomp.delethink.TraceError) as caught:
        run([long, *PROBLEMS])
    error = caught.value
    assert list(error.failures) == [("long", 0)]
    assert "1 of 3 traces failed, 2 were completed" in str(error)
    assert "'long' sample 0" in str(error) and "maximum context length is 50" in str(error)
    assert str(tmp_path / "log.jsonl") in str(error)
    assert [trace.id for trace in error.run.traces] == ["walk 0", "walk 1"]

    engine.max_model_len = 4096
    engine.requests.clear()
    result = run([long, *PROBLEMS])
    assert result.resumed == 6 and len(engine.requests) == 1 + 3
    for found in result.traces:
        assert found.output == by_hand(generate, found.prompt, SHORT)


def test_a_server_that_stops_early_is_an_error(run, engine):
    """Where its context is full, say; a chunk that is too short would shift all that follow."""

    def cut(request, answer):
        if request["max_tokens"] == 4:
            answer["choices"][0]["token_ids"] = answer["choices"][0]["token_ids"][:3]
        return answer

    engine.twist = cut
    with pytest.raises(kvcomp.delethink.TraceError, match="after 3 of 4 tokens"):
        run()
    engine.twist = change(token_ids=[5] * 9)
    with pytest.raises(kvcomp.delethink.EngineError, match="9 tokens, but the limit was 1"):
        run()


def test_a_lost_server_ends_the_run_and_keeps_the_chunks(run, engine, generate, tmp_path):
    def lose(request, answer):
        return answer if len(engine.requests) < 5 else (403, "gone")

    engine.twist = lose
    with pytest.raises(kvcomp.delethink.TraceError) as caught:
        run(samples=3, concurrency=1)
    assert "1 of 6 traces failed, 1 were completed, 4 were not" in str(caught.value)
    assert len(engine.requests) == 5 and chunks_in(tmp_path / "log.jsonl") == 3
    engine.twist = lambda request, answer: answer
    result = run(samples=3)
    assert result.resumed == 3
    for found in result.traces:
        assert found.output == by_hand(generate, found.prompt, SHORT)
