"""kvcomp's backend in a real vLLM, on a real model, in fp32: token for token.

Runs in an environment that has vLLM (.ci/run makes one) and is skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import kvcomp
from kvcomp import models
from kvcomp.engines.vllm import VERSIONS
from kvcomp.engines.vllm.settings import Settings

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
DELTA = {"method": "delta", "budget": 256, "page_size": 16, "recent": 4}
TOKENS = 32

has_vllm = importlib.util.find_spec("vllm") is not None
in_engine = pytest.mark.skipif(not has_vllm, reason=f"vLLM {VERSIONS} is not installed here")
LAZY = {"method": "lazy-eviction", "budget": 256, "window": 64, "alpha": 0.01}


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(models.path(MODEL))
    except (ValueError, FileNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    """Pieces of a long English text: below the budget of `DELTA`, and up to four times of it."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    spans = ((0, 40), (1000, 300), (3000, 1000), (9000, 700))
    return [ids[first : first + count] for first, count in spans]


def environment() -> dict[str, str]:
    """Of a small engine: one thread on any core."""
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


def engine(model, prompts, kvcomp, calls, tokens=TOKENS, **options):
    """What `slow/vllm_engine.py` finds; everything in one batch unless `calls` says otherwise."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 512, "max_num_seqs": 8} | options
    job = {
        "model": model,
        "kvcomp": kvcomp,
        "prompts": prompts,
        "calls": calls,
        "tokens": tokens,
        "engine": options,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "slow" / "vllm_engine.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(),
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (json.loads(found[0].removeprefix("RESULT ")) if found else None), done


def under_transformers(model, prompts, method, tokens=TOKENS):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    with kvcomp.patch(network, method) as run:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            answers.append(out[0, len(prompt) :].tolist())
    assert run.report().tokens_decoded
    return answers


@pytest.fixture(scope="module")
def dense(model, prompts):
    return under_transformers(model, prompts, kvcomp.Full())


TOGETHER = [0, 1, 2, 3]


@in_engine
def test_a_server_that_asks_for_nothing_is_stock(model, prompts, dense):
    found, done = engine(model, prompts, None, [TOGETHER])
    assert found["calls"][0]["tokens"] == dense
    assert "kvcomp:" not in done.stdout + done.stderr


@in_engine
def test_full_is_dense(model, prompts, dense):
    found, done = engine(model, prompts, {"method": "full"}, [TOGETHER])
    assert found["calls"][0]["tokens"] == dense
    assert "kvcomp: Full() on 30 of 30 layers" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def under_delta(model, prompts):
    """One engine for many calls, in a pool of 26 blocks; and what transformers gives.

    Eight requests of 370 tokens, which after 14 more want 32 blocks, are behind the prompts.
    """
    crowd = [prompts[2][start : start + 370] for start in range(0, 560, 70)]
    calls = [
        *(TOGETHER, [2], [3]),
        {"prompts": list(range(4, 12))},
        {"prompts": [3, 4], "n": 3, "top_k": 1, "temperature": 0.5},
        {"prompts": [4, 3, 5], "abort": 1},
        [3, 5],
    ]
    options = {"num_gpu_blocks_override": 26}
    found, done = engine(model, prompts + crowd, DELTA, calls, **options)
    assert found is not None, done.stderr[-2000:]
    method = Settings.read(DELTA).method
    return found["calls"], under_transformers(model, prompts + crowd[:2], method)


@in_engine
def test_delta_is_delta_under_transformers(under_delta, dense):
    """Prompts come in pieces beside decode rows, and later from the prefix cache."""
    (together, *alone, _, _, _, _), expected = under_delta
    assert expected[:4] != dense
    assert together["tokens"] == expected[:4] and together["preemptions"] == 0
    assert [call["tokens"][0] for call in alone] == expected[2:4]
    assert all(call["cached"][0] >= 512 for call in alone)


@in_engine
def test_delta_with_preemptions(under_delta):
    """The last to come make room for the first, and are processed again."""
    calls, expected = under_delta
    crowded = calls[3]
    assert crowded["preemptions"] > 0
    assert crowded["tokens"][:2] == expected[4:]
    assert [len(tokens) for tokens in crowded["tokens"]] == [TOKENS] * 8


@in_engine
def test_delta_draws_several_answers_to_a_prompt(under_delta):
    """They share the blocks of the prompt; drawn from one best token, all are the greedy answer."""
    calls, expected = under_delta
    assert calls[4]["tokens"] == [[expected[3]] * 3, [expected[4]] * 3]


@in_engine
def test_delta_when_a_request_is_aborted(under_delta):
    """The others go on, and the next ones get its blocks."""
    calls, expected = under_delta
    first, aborted, last = calls[5]["tokens"]
    assert [first, last] == expected[4:]
    assert 0 < len(aborted) < TOKENS and aborted == expected[3][: len(aborted)]
    assert calls[6]["tokens"] == [expected[3], expected[5]]


@in_engine
def test_delta_on_two_ranks(model, prompts, monkeypatch):
    """SmolLM2 has 9 heads, which two ranks cannot share: the reasoner has 4, and 2 of K and V."""
    from kvcomp import reasoner

    folder = str(reasoner.path())
    problems = [reasoner.task.make_problem(nodes=8, seed=seed).prompt for seed in range(3)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [tokenizer(text)["input_ids"] for text in problems]
    small = {"method": "delta", "budget": 64, "page_size": 4, "recent": 2, "delta_layers": [2]}
    options = {"max_model_len": 1024, "max_num_batched_tokens": 64}
    one, _ = engine(folder, asked, small, [[0, 1, 2]], tokens=64, **options)
    two, done = engine(
        folder, asked, small, [[0, 1, 2]], tokens=64, tensor_parallel_size=2, **options
    )
    assert two is not None, done.stderr[-2000:]
    assert two["calls"] == one["calls"]


@in_engine
def test_blocks_leave_a_running_request(model, prompts):
    """Six requests of 300 + 500 tokens need 42 blocks of 128; the pool has 32."""
    asked = [prompts[2][start : start + 300] for start in range(0, 600, 100)]
    window = {"method": "sink-window", "budget": 300, "sinks": 100}
    options = {"enable_prefix_caching": False, "tokens": 500}
    calls = [list(range(6))]
    freed, done = engine(model, asked, window, calls, num_gpu_blocks_override=32, **options)
    assert freed is not None, done.stderr[-2000:]
    assert freed["preemptions"] == 0
    kept, _ = engine(model, asked, window | {"free": False}, calls, **options)
    assert freed["calls"][0]["tokens"] == kept["calls"][0]["tokens"]
    stock, _ = engine(model, asked, None, calls, num_gpu_blocks_override=32, **options)
    assert stock["preemptions"] > 0


@in_engine
def test_lazy_eviction_is_that_under_transformers(model, prompts):
    """Prompts of whole windows, as a request is cut where its length is one. The pool has room for
    what stays, and not for all tokens."""
    asked = [prompts[2][start : start + 320] for start in range(0, 600, 100)]
    method = Settings.read(LAZY).method
    expected = under_transformers(model, asked[:2], method, tokens=400)
    options = {"enable_prefix_caching": False, "tokens": 400, "num_gpu_blocks_override": 26}
    calls = [list(range(6)), [1]]
    found, done = engine(model, asked, LAZY, calls, **options)
    assert found is not None, done.stderr[-2000:]
    together, alone = found["calls"]
    assert alone["tokens"][0] == together["tokens"][1]
    assert together["tokens"][:2] == expected
    assert found["preemptions"] == 0
    stock, _ = engine(model, asked, None, calls, **options)
    assert stock["preemptions"] > 0


@in_engine
@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"method": "h2o"}, "method: expected one of full, delta, lazy-eviction, sink-window"),
        (DELTA | {"page_size": 24, "budget": 240}, "page_size=24, which does not divide"),
    ],
)
def test_what_cannot_work_stops_the_start(model, prompts, wanted, reason):
    found, done = engine(model, prompts, wanted, [[0]])
    assert found is None and done.returncode
    assert reason in done.stdout + done.stderr


# --- a real server --------------------------------------------------------------------------------

SERVED = ("--budget", "64", "--set", "page_size=4", "--set", "recent=2", "--set", "delta_layers=2")


@contextmanager
def server(folder: Path, port: int):
    """`kvcomp serve` with the reasoner under Delta; killed with all of its processes at the end."""
    from kvcomp import reasoner

    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
    command = [sys.executable, "-m", "kvcomp", "serve", str(reasoner.path()), *SERVED]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "4", *options]
    log = folder / "serve.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(), start_new_session=True
        )
    try:
        for _ in range(3000):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"no server within minutes: {log.read_text()[-2000:]}")
        yield log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@in_engine
def test_delethink_over_delta_on_a_server_that_is_killed(tmp_path):
    from kvcomp import reasoner

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    problem = reasoner.task.make_problem(nodes=8, steps=60, seed=1)
    asked = tmp_path / "problems.jsonl"
    asked.write_text(json.dumps({"id": "walk", "prompt": problem.prompt}) + "\n")

    def delethink(name, *more, chunk="96"):
        files = ("--problems", asked, "--log", tmp_path / name, "--out", tmp_path / f"{name}.out")
        size = ("--chunk", chunk, "--carry", "48", "--head", "8", "--max-chunks", "5")
        model = ("--url", f"http://127.0.0.1:{port}/v1", "--model", reasoner.path())
        command = [sys.executable, "-m", "kvcomp", "delethink", *model, *files, *size]
        command += ["--temperature", "0", *more]
        return subprocess.Popen(
            [str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def chunks(name):
        file = tmp_path / name
        return file.read_text().count('"chunk"') if file.exists() else 0

    with server(tmp_path, port) as log:
        assert "kvcomp: Delta(" in log.read_text()
        whole = delethink("whole")
        report, errors = whole.communicate(timeout=600)
        assert whole.returncode == 0, errors
        assert b"exact" in report
        broken = delethink("broken", "--retries", "300")
        while broken.poll() is None and chunks("broken") < 2:
            time.sleep(0.005)
    left = chunks("broken")
    with server(tmp_path, port):
        _, errors = broken.communicate(timeout=600)
        assert broken.returncode == 0, errors
        long = delethink("long", chunk="4096")
        _, refused = long.communicate(timeout=600)
        assert long.returncode and b"1024" in refused
    first, second = (
        json.loads((tmp_path / f"{name}.out").read_text()) for name in ("whole", "broken")
    )
    assert left < chunks("whole")
    assert first["output"] == second["output"]
    assert reasoner.task.grade(problem, first["text"]).step_accuracy == 1
