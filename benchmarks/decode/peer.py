"""Other engines beside ours: the same weights, each in a process of its own, steps in turn."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from decode.contenders import STOCK
from decode.models import make_model
from decode.steps import PARTS
from decode.weights import NAMES, write_gguf
from kvcomp import models
from ops.common import DTYPES

ENGINES = {
    "kvcomp": "kvcomp_engine",
    "llama.cpp": "llama_cpp_engine",
    "openvino": "openvino_engine",
    "vllm": "vllm_engine",
}
OURS = "kvcomp"
STEPS = 5  # of a contender in a round, of which the first is not counted
PAUSE = 0.03  # seconds before a turn, in which the threads of others stop spinning
PROMPT = "The capital of France is Paris, and the capital of Germany is Berlin. The Rhine flows"
GREEDY = 16  # tokens behind it that are compared
BLOCKTIME = "10"  # ms for which threads of Intel's OpenMP spin, else 200


@dataclass(frozen=True)
class PeerRow:
    """Times in ms, of steps that take every sequence one token further."""

    part: str
    model: str
    batch: int
    tokens: int  # seen by each sequence
    name: str
    version: str
    ms: float
    ms_min: float
    steps: int
    kvcomp_ahead: float  # how many times faster kvcomp's eager step is; below 1 it is slower
    kvcomp_ahead_min: float  # by minima
    agreed: int  # greedy tokens as those of transformers, of GREEDY
    attention_ms: float | None = None  # of a step that is looked into; None: it shows no parts
    update_ms: float | None = None
    linear_ms: float | None = None
    norm_ms: float | None = None
    rest_ms: float | None = None

    def line(self) -> str:
        text = (
            f"{self.model} B={self.batch} n={self.tokens:<6} {self.name:22} {self.version:10}"
            f" {self.ms:8.2f} ms (min {self.ms_min:7.2f})  kvcomp {self.kvcomp_ahead:5.2f}x"
            f" (min {self.kvcomp_ahead_min:5.2f}x)  greedy {self.agreed}/{GREEDY}"
        )
        parts = {name: getattr(self, f"{name}_ms") for name in (*PARTS, "rest")}
        if any(parts.values()):
            text += "".join(f"  {name} {ms:.2f}" for name, ms in parts.items())
        return text


class Worker:
    """An engine's process; see `engines/worker.py`.

    Raises:
        RuntimeError: it does not start, or a call fails, with the reason.
    """

    def __init__(self, engine: str, python: str, job: dict[str, Any]) -> None:
        self.engine = engine
        script = Path(__file__).parent / "engines" / "worker.py"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job["threads"]),
            "KMP_BLOCKTIME": BLOCKTIME,
        }
        environment.pop("PYTHONPATH", None)
        try:
            self.process = subprocess.Popen(
                [python, str(script), ENGINES[engine]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as problem:
            raise RuntimeError(f"{python}: {problem.strerror}") from None
        self.versions: dict[str, str] = self.ask("load", job)

    def ask(self, *call: object) -> Any:
        try:
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line or f'{{"error": "its process ended at `{call[0]}`"}}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def is_peer(row: dict) -> bool:
    return row["part"] == "peer" and not row["name"].startswith((OURS, STOCK))


def named(text: str) -> tuple[str, str]:
    """NAME or NAME=PYTHON, of `--peer`."""
    name, _, python = text.partition("=")
    if name not in ENGINES or name == OURS:
        known = ", ".join(sorted(set(ENGINES) - {OURS}))
        raise argparse.ArgumentTypeError(f"expected one of {known}, with =PYTHON or without")
    return name, python or sys.executable


def bench_peer(options: argparse.Namespace) -> Iterator[PeerRow]:
    """All batch sizes and lengths; those in `options.done` are left out."""
    with tempfile.TemporaryDirectory() as place:
        folder, prompt = _weights(options, Path(place))
        for batch in options.batch:
            lengths = [n for n in options.tokens if (batch, n) not in options.done]
            if not lengths:
                continue
            job = {
                "model": str(folder),
                "gguf": str(Path(place) / "model.gguf"),
                "batch": batch,
                "room": max(*lengths, 64) + 2 * STEPS * options.rounds,
                "threads": torch.get_num_threads(),
                "compile": not options.smoke,
            }
            with ExitStack() as stack:
                workers = list(_start(options.peer, job, stack))
                agreed = _agreed(workers, prompt)
                for tokens in sorted(lengths):
                    for worker in workers:
                        worker.ask("stand", tokens)
                    seconds = _race(workers, options)
                    yield from list(_rows(workers, seconds, agreed, batch, tokens, options))


def _weights(options: argparse.Namespace, place: Path) -> tuple[Path, list[int]]:
    """A folder for transformers, with `place`/model.gguf, and the ids of a prompt."""
    if options.model is None:
        model = make_model(options.shape, torch.bfloat16, "cpu", options.seed)
        folder, prompt, vocabulary = place / "model", list(range(5, 25)), None
        model.save_pretrained(folder)
    else:
        folder = Path(models.path(options.model))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES["bf16"])
        prompt = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
        vocabulary = folder / "tokenizer.json"
    if options.peer:
        _check(model)
        write_gguf(model, place / "model.gguf", vocabulary)
    return folder, prompt


def _check(model: PreTrainedModel) -> None:
    if model.config.model_type not in NAMES:
        raise ValueError(f"bench_decode: --peer: no GGUF of {model.config.model_type} is known")


def _start(peers: list[tuple[str, str]], job: dict[str, Any], stack: ExitStack) -> Iterator[Worker]:
    for name, python in [(OURS, sys.executable), *peers]:
        try:
            worker = Worker(name, python, job)
        except RuntimeError as problem:
            if name == OURS:
                raise
            print(f"{name}: skipped: {problem}", file=sys.stderr, flush=True)
            continue
        stack.callback(worker.close)
        yield worker


def _agreed(workers: list[Worker], prompt: list[int]) -> dict[str, int]:
    """How many of the tokens behind the prompt each contender has in common with transformers."""
    found: dict[str, list[int]] = {}
    for worker in workers:
        found |= worker.ask("greedy", prompt, GREEDY)
    want = found[STOCK]
    pairs = {name: zip(tokens, want, strict=True) for name, tokens in found.items()}
    return {name: sum(a == b for a, b in pair) for name, pair in pairs.items()}


def _race(workers: list[Worker], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by contender, who take turns in an order that changes."""
    players = [(worker, name) for worker in workers for name in worker.versions]
    seconds: dict[str, list[float]] = {name: [] for _, name in players}
    order, began = random.Random(options.seed), time.perf_counter()
    for turn in range(options.rounds + 1):
        if turn > 2 and time.perf_counter() - began > options.seconds:
            break
        for worker, name in order.sample(players, len(players)):
            time.sleep(PAUSE)
            found = worker.ask("step", name, STEPS)
            if turn:  # in the first round everybody warms up
                seconds[name] += found[1:]
    return seconds


def _rows(
    workers: list[Worker],
    seconds: dict[str, list[float]],
    agreed: dict[str, int],
    batch: int,
    tokens: int,
    options: argparse.Namespace,
) -> Iterator[PeerRow]:
    ours = seconds[OURS]
    for worker in workers:
        for name in worker.versions:
            own = seconds[name]
            yield PeerRow(
                part="peer",
                model=options.model or options.shape,
                batch=batch,
                tokens=tokens,
                name=name,
                version=worker.versions[name],
                ms=median(own) * 1e3,
                ms_min=min(own) * 1e3,
                steps=len(own),
                kvcomp_ahead=median(own) / median(ours),
                kvcomp_ahead_min=min(own) / min(ours),
                agreed=agreed[name],
                **(worker.ask("parts", name) or {}),
            )
