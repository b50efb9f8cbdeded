"""A stand-in for an engine, and `kvcomp.delethink.trace` as the tests call it."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import kvcomp
from kvcomp import Delethink, reasoner
from kvcomp.reasoner import task

LONG = Delethink(chunk=64, carry=32, head=8, max_chunks=6)  # 224 tokens, 56 steps
SHORT = Delethink(chunk=8, carry=4, head=2, max_chunks=3)  # 16 tokens
GREEDY = kvcomp.delethink.Sampling(temperature=0)
EOS = 2


def problem(seed):
    return task.make_problem(nodes=4, steps=LONG.budget // task.TOKENS_PER_STEP, seed=seed)


PROBLEMS = [{"id": f"walk {seed}", "prompt": problem(seed).prompt} for seed in (0, 1)]


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
    import openai

    async def work():
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=timeout, max_retries=retries
        ) as client:
            return await kvcomp.delethink.trace(
                client, problems, method, **{"model": reasoner.path(), "sampling": GREEDY} | options
            )

    return asyncio.run(work())


def outputs(run):
    return {trace.id: trace.output for trace in run.traces}


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
