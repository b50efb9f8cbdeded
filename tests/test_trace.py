"""Delethink on a server: a real `transformers serve`, and a stand-in that speaks as vLLM does."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("openai")

import openai

import kvcomp
from kvcomp import Delethink, cli, reasoner
from kvcomp.reasoner import task

LONG = Delethink(chunk=64, carry=32, head=8, max_chunks=6)  # 224 tokens, 56 steps
SHORT = Delethink(chunk=8, carry=4, head=2, max_chunks=3)  # 16 tokens
GREEDY = kvcomp.delethink.Sampling(temperature=0)
EOS = 2


def problem(seed):
    return task.make_problem(nodes=4, steps=LONG.budget // task.TOKENS_PER_STEP, seed=seed)


PROBLEMS = [{"id": f"walk {seed}", "prompt": problem(seed).prompt} for seed in (0, 1)]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(reasoner.path())


@pytest.fixture(scope="module")
def model(one_thread):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype="auto")


@pytest.fixture(scope="module")
def generate(model):
    """Greedy `generate` on token ids, one at a time; what was asked for before is remembered."""
    known, lock = {}, threading.Lock()

    def call(context, limit):
        key = (tuple(context), limit)
        with lock:
            if key not in known:
                inputs = torch.tensor([context])
                out = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=limit
                )
                known[key] = out[0, len(context) :].tolist()
        return known[key]

    return call


def by_hand(generate, prompt, method):
    """The loop of the paper, with nothing but lists."""
    output = generate(prompt, method.chunk)
    tail = method.carry - (method.head if method.variant == "exact_bound" else 0)
    for _ in range(method.max_chunks - 1):
        kept = output[: method.head] + output[len(output) - tail :]
        output = output + generate(prompt + kept, method.chunk - method.carry)
    return output


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def trace(url, problems=PROBLEMS, method=LONG, *, timeout=600, retries=0, **options):
    """`kvcomp.delethink.trace`, called from code that is not async."""

    async def work():
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=timeout, max_retries=retries
        ) as client:
            return await kvcomp.delethink.trace(
                client, problems, method, **{"model": reasoner.path(), "sampling": GREEDY} | options
            )

    return asyncio.run(work())


def chunks_in(log):
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return sum(line.endswith(b"\n") for line in lines[1:])


def wait_for_chunks(log, count, process=None):
    for _ in range(6000):
        if chunks_in(log) >= count:
            return
        assert process is None or process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    pytest.fail(f"no {count} chunks within minutes")


# --- a real engine: transformers serve ------------------------------------------------------------


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
    return trace(server.url, tokenizer=tokenizer, log=log)


def outputs(run):
    return {trace.id: trace.output for trace in run.traces}


def test_a_real_server_says_what_the_loop_on_the_model_says(uninterrupted, tokenizer, generate):
    run = uninterrupted
    assert run.tokens == "text" and "422" in run.reason and "return_token_ids" in run.reason
    assert [trace.id for trace in run.traces] == ["walk 0", "walk 1"]
    for seed, trace in enumerate(run.traces):
        prompt = ids_of(tokenizer, problem(seed).prompt)
        assert trace.prompt == prompt
        assert trace.output == by_hand(generate, prompt, LONG)
        assert (trace.finish, trace.chunks, trace.drift) == ("budget", 6, 0)
        assert trace.longest_context == len(prompt) + LONG.chunk
        assert task.grade(problem(seed), tokenizer.decode(trace.output)).step_accuracy == 1


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


# --- a stand-in for an engine with token ids ------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """The bundled model behind vLLM's wire format. It is no vLLM; it answers in its form.

    `twist(request, answer)` may change an answer, or return (HTTP status, body) in its place;
    `models` is what GET /v1/models returns, None for a server without it.
    """

    daemon_threads = True

    def __init__(self, tokenizer, generate, max_model_len=4096):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.generate, self.max_model_len = tokenizer, generate, max_model_len
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.busy, self.busiest, self.lock = [], 0, 0, threading.Lock()
        self.twist = lambda request, answer: answer
        self.models = None

    def tell_context(self):
        model = {"id": reasoner.path(), "object": "model", "max_model_len": self.max_model_len}
        self.models = {"object": "list", "data": [{"id": "another", "max_model_len": 1}, model]}

    def count(self, more):
        with self.lock:
            self.busy += more
            self.busiest = max(self.busiest, self.busy)

    def complete(self, request):
        prompt, limit = request["prompt"], request["max_tokens"]
        ids = ids_of(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        if len(ids) + limit > self.max_model_len:
            message = f"maximum context length is {self.max_model_len} tokens"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        new = list(self.generate(ids, limit))
        choice = {"index": 0, "text": self.tokenizer.decode(new), "finish_reason": "length"}
        if request.get("return_token_ids"):
            choice |= {"token_ids": new, "prompt_token_ids": ids}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.requests.append(request)
        server.count(1)
        answer = server.complete(request)
        if isinstance(answer, dict):
            answer = server.twist(request, answer)
        server.count(-1)
        self.answer(*(answer if isinstance(answer, tuple) else (200, answer)))

    def do_GET(self):
        models = self.server.models
        self.answer(*((404, "no such page") if models is None else (200, models)))

    def answer(self, status, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", f"{'text/html' if body is data else 'application/json'}")
        self.send_header("content-length", str(len(data)))
        with contextlib.suppress(ConnectionError):  # who asked may be gone
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def engine(tokenizer, generate):
    server = StandIn(tokenizer, generate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(engine, tokenizer, tmp_path):
    """`trace` on the stand-in, with short chunks, and the same log each time."""

    def call(problems=PROBLEMS, method=SHORT, **options):
        options = {"tokenizer": tokenizer, "log": tmp_path / "log.jsonl"} | options
        return trace(engine.url, problems, method, **options)

    return call


@pytest.mark.parametrize(
    "method",
    [
        LONG,
        Delethink(chunk=8, carry=6, head=2, max_chunks=4),  # the carry is longer than a response
        Delethink(chunk=8, carry=4, head=2, max_chunks=3, variant="paper"),
    ],
    ids=lambda method: f"{method.chunk}-{method.carry}-{method.variant}",
)
def test_token_ids_go_both_ways(run, engine, generate, method):
    result = run(method=method)
    assert (result.tokens, result.reason) == ("ids", None) and "exact" in str(result)
    for trace in result.traces:
        assert trace.output == by_hand(generate, trace.prompt, method)
        assert trace.longest_context == len(trace.prompt) + method.most_thought
    work = engine.requests[1:]  # the first one tries the server
    assert len(work) == 2 * method.max_chunks
    assert {each["max_tokens"] for each in work} == {method.chunk, method.chunk - method.carry}
    for request in work:
        assert all(type(token) is int for token in request["prompt"])
        assert request["return_token_ids"] is True
        assert (request["temperature"], request["top_p"], request["top_k"]) == (0, 1, -1)


def test_ids_need_no_tokenizer(run, tokenizer, engine):
    with_text = run()
    given = [{"id": each["id"], "ids": ids_of(tokenizer, each["prompt"])} for each in PROBLEMS]
    before = len(engine.requests)
    assert outputs(run(given, tokenizer=None)) == outputs(with_text)
    assert len(engine.requests) == before  # all of it was in the log


def test_messages_take_the_chat_template(run, engine, tokenizer, monkeypatch):
    template = "<bos> {% for m in messages %}{{ m.content }}{% endfor %} sum 3"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (found,) = run([{"id": 1, "messages": [{"role": "user", "content": "from ba"}]}]).traces
    assert found.prompt == ids_of(tokenizer, "from ba sum 3")


@pytest.mark.parametrize("where", [2, 7, 8, 11])  # first chunk: tokens 0 to 7, then 4 at a time
def test_the_end_token_ends_a_trace(run, engine, where):
    """At the limit of a chunk too, which engines call "length"."""

    def end(request, answer):
        choice = answer["choices"][0]
        start = {8: 0, 4: 8, 1: -99}[request["max_tokens"]]
        place = where - start
        if 0 <= place < len(choice["token_ids"]):
            choice["token_ids"][place:] = [EOS]
            if place + 1 < request["max_tokens"]:
                choice["finish_reason"] = "stop"
        return answer

    engine.twist = end
    result = run(PROBLEMS[:1])
    (trace,) = result.traces
    assert trace.finish == "eos" and len(trace.output) == where + 1 and trace.output[-1] == EOS
    assert trace.chunks == (1 if where < 8 else 2)
    assert "1 ended by EOS, 0 by the budget" in str(result)


def test_more_chunks_and_samples_go_on_from_the_log(run, engine, generate):
    first = run(PROBLEMS[:1], method=Delethink(chunk=8, carry=4, head=2, max_chunks=1))
    longer = run(PROBLEMS[:1])
    assert longer.resumed == 1 and longer.traces[0].output[:8] == first.traces[0].output
    assert longer.traces[0].output == by_hand(generate, longer.traces[0].prompt, SHORT)
    both = run(samples=2)
    assert both.resumed == 3 and [(t.id, t.sample) for t in both.traces] == [
        (name, sample) for name in ("walk 0", "walk 1") for sample in (0, 1)
    ]
    again = run(PROBLEMS[:1], method=Delethink(chunk=8, carry=4, head=2, max_chunks=1))
    assert again.traces == first.traces  # a smaller budget is a cut


def test_every_chunk_has_a_seed_of_its_own(run, engine, tmp_path):
    sampling = kvcomp.delethink.Sampling(seed=5, extra={"min_p": 0.1})
    drawn = []
    for log in ("one", "two"):
        engine.requests.clear()
        run(sampling=sampling, samples=2, log=tmp_path / log)
        drawn.append({request.get("seed") for request in engine.requests[1:]})
        assert all(request["min_p"] == 0.1 for request in engine.requests[1:])
        assert {request["temperature"] for request in engine.requests} == {0.6}
    assert len(drawn[0]) == 12 and drawn[0] == drawn[1]


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_bounded(run, engine, limit):
    def wait_for_others(request, answer):
        for _ in range(1000 * (request["max_tokens"] > 1)):
            if engine.busiest >= limit:
                break
            time.sleep(0.03)
        return answer

    engine.twist = wait_for_others
    run(samples=4, concurrency=limit)
    assert engine.busiest == limit


# --- ids or text ----------------------------------------------------------------------------------


def without_ids(request, answer):
    for name in ("token_ids", "prompt_token_ids"):
        answer["choices"][0].pop(name, None)
    return answer


def reads_a_list_as_text(request, answer):
    if isinstance(request["prompt"], list):  # which is then another prompt
        answer = without_ids(request, answer)
        answer["choices"][0]["token_ids"] = [5] * request["max_tokens"]
        answer["usage"]["prompt_tokens"] = len(str(request["prompt"]))
    return answer


def cuts_the_prompt(request, answer):
    if isinstance(request["prompt"], list):
        answer["choices"][0]["prompt_token_ids"] = request["prompt"][1:]
    return answer


def refuses_lists(request, answer):
    refused = isinstance(request["prompt"], list)
    return (400, {"detail": "prompt must be a string."}) if refused else answer


@pytest.mark.parametrize(
    "twist, why",
    [
        (without_ids, "returned no token ids"),
        (reads_a_list_as_text, "did not read the prompt"),
        (cuts_the_prompt, "did not read the prompt"),
        (refuses_lists, 'HTTP 400: {"detail": "prompt must be a string."}'),
    ],
)
def test_without_exact_ids_it_falls_back_to_text_and_says_so(
    run, engine, generate, tmp_path, twist, why
):
    engine.twist = twist
    with pytest.raises(kvcomp.delethink.EngineError, match=why.split("{")[0]):
        run(tokens="ids", log=tmp_path / "ids.jsonl")
    for _ in range(2):  # the second time, the log says it
        result = run()
        assert result.tokens == "text" and why in result.reason and why in str(result)
        for trace in result.traces:
            assert trace.output == by_hand(generate, trace.prompt, SHORT) and trace.drift == 0
    with pytest.raises(ValueError, match="tokens was 'text' and is 'ids'"):
        run(tokens="ids")


def test_drift_is_counted(run, engine):
    def glue(request, answer):  # two words in one, which the tokenizer does not know
        choice = answer["choices"][0]
        choice["text"] = choice["text"].replace(" ", "", 1)
        return answer

    engine.twist = glue
    result = run(PROBLEMS[:1], tokens="text")
    (trace,) = result.traces
    assert trace.chunks == 3 and len(trace.output) == 16 - 3
    assert trace.drift == 3 and "3 tokens" in str(result).splitlines()[-1]


def test_another_models_tokenizer_is_noticed(run, engine):
    def count(request, answer):
        answer["usage"]["prompt_tokens"] += 5
        return answer

    engine.twist = count
    with pytest.raises(kvcomp.delethink.EngineError, match="is it the model's tokenizer"):
        run(tokens="text")


# --- what goes wrong ------------------------------------------------------------------------------


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


# --- the server's context -------------------------------------------------------------------------


def needed(tokenizer):
    return [len(ids_of(tokenizer, each["prompt"])) + SHORT.most_thought for each in PROBLEMS]


def test_the_test_of_a_server_leaves_out_extra_fields(run, engine):
    """vLLM refuses a request whose min_tokens exceed its max_tokens, 1 in that test."""

    def at_least(request, answer):
        if request.get("min_tokens", 0) > request["max_tokens"]:
            return 400, {"error": {"message": "min_tokens must be at most max_tokens"}}
        return answer

    engine.twist = at_least
    result = run(sampling=kvcomp.delethink.Sampling(temperature=0, extra={"min_tokens": 4}))
    assert len(result.traces) == 2 and result.tokens == "ids"
    assert [request.get("min_tokens") for request in engine.requests] == [None] + 6 * [4]


def test_a_chunk_longer_than_the_context_is_found_before_the_work(
    run, engine, tokenizer, generate, tmp_path
):
    engine.max_model_len = min(needed(tokenizer)) - 1
    engine.tell_context()
    with pytest.raises(kvcomp.delethink.EngineError) as caught:
        run()
    prompt = engine.max_model_len + 1 - SHORT.most_thought
    assert f"a prompt of {prompt} tokens and a chunk of 8 need {prompt + 8}" in str(caught.value)
    assert f"(max_model_len) is {engine.max_model_len}" in str(caught.value)
    assert len(engine.requests) == 1 and chunks_in(tmp_path / "log.jsonl") == 0

    engine.max_model_len = max(needed(tokenizer))  # just enough
    engine.tell_context()
    for trace in run().traces:
        assert trace.output == by_hand(generate, trace.prompt, SHORT)
    engine.max_model_len = 1
    engine.tell_context()
    assert run().resumed == 6  # nothing is left to ask for


def test_a_problem_longer_than_the_context_is_not_sent(run, engine, tokenizer):
    long = {"id": "long", "prompt": " ".join([PROBLEMS[0]["prompt"]] * 2)}
    engine.max_model_len = max(needed(tokenizer))
    engine.tell_context()
    with pytest.raises(kvcomp.delethink.TraceError, match="1 of 3 traces failed, 2 were") as caught:
        run([long, *PROBLEMS])
    assert "max_model_len" in str(caught.value.failures["long", 0])
    assert len(engine.requests) == 1 + 6


@pytest.mark.parametrize(
    "models",
    [
        {"object": "list", "data": []},
        {"object": "list", "data": None},
        {"object": "list", "data": [3, None]},
        {"object": "list", "data": [{"id": reasoner.path()}]},
        {"object": "list", "data": [{"id": reasoner.path(), "max_model_len": None}]},
        {"object": "list", "data": [{"id": reasoner.path(), "max_model_len": "4"}]},
        {"object": "list", "data": [{"id": reasoner.path(), "max_model_len": 0}]},
        {"object": "list", "data": [{"id": "another", "max_model_len": 1}]},
        "<html>hello</html>",
        [],
    ],
    ids=str,
)
def test_a_server_that_does_not_tell_its_context_is_used(run, engine, models):
    engine.models = models
    assert len(run().traces) == 2


def clip(room):
    """What vLLM does with a max_tokens that it has no room for: fewer tokens, no error."""

    def twist(request, answer):
        new = answer["choices"][0]["token_ids"][: room(request)]
        answer["choices"][0]["token_ids"] = new
        answer["usage"]["completion_tokens"] = len(new)
        return answer

    return twist


@pytest.mark.parametrize("tokens", ["ids", "text"])
def test_a_server_that_clips_max_tokens(run, engine, tokenizer, tokens, tmp_path):
    prompt = min(needed(tokenizer)) - SHORT.most_thought
    engine.twist = clip(lambda request: max(prompt + 6 - len(request["prompt"]), 1))
    if tokens == "text":
        engine.twist = lambda request, answer: clip_text(answer, 6, tokenizer)
    with pytest.raises(kvcomp.delethink.TraceError) as caught:
        run(PROBLEMS[:1], tokens=tokens)
    assert "after 6 of 8 tokens: is its context shorter than the" in str(caught.value)
    assert chunks_in(tmp_path / "log.jsonl") == 0


def clip_text(answer, limit, tokenizer):
    words = answer["choices"][0]["text"].split()[:limit]
    answer["choices"][0]["text"] = " ".join(words)
    answer["usage"]["completion_tokens"] = len(words)
    return answer


def test_a_limit_on_new_tokens_is_not_called_a_short_context(run, engine):
    """Its context is known and long enough, so something else cut the answer."""
    engine.tell_context()
    engine.twist = clip(lambda request: 6)
    with pytest.raises(kvcomp.delethink.TraceError) as caught:
        run(PROBLEMS[:1])
    assert "after 6 of 8 tokens, although its context of 4096 has room" in str(caught.value)
    assert "max_new_tokens" in str(caught.value)


# --- the log --------------------------------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------


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


def test_the_old_name_of_the_command_warns(capsys, tmp_path):
    Path("problems.jsonl").write_text(json.dumps(PROBLEMS[0]) + "\n")
    url = ("--url", "127.0.0.1:1/v1", "--model", "served", "--tokenizer", "reasoner")
    assert cli.main(["trace", *url, "--problems", "problems.jsonl", "--log", "log.jsonl"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("kvcomp: warning: kvcomp trace is now called kvcomp delethink")
    assert error.startswith("kvcomp: error: --url: expected http://")


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
