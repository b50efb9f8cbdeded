"""A model and its problems: batches decoded under a method, and graded."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

import kvcomp
from accuracy.sizes import Room
from evaluation import problems as files
from evaluation.checkers import CHECKERS, Grade
from evaluation.problems import Problem
from evaluation.published import PRESETS
from kvcomp import Method
from kvcomp.cache import Report
from kvcomp.cli.common import load, pick_device, pick_dtype
from kvcomp.hf.shape import shape_of
from kvcomp.methods.cost import Place
from kvcomp.reasoner import task

CALIBRATION_SEED = 1000  # no walk that is graded has such a seed, or one behind it
LOOKS = 96  # at what a cache holds, over a generation


class Workload:
    """What is decoded: the same batches by every method.

    Attributes:
        room: the longest context that there will be.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.walks = options.problems is None
        device, dtype = pick_device(options.device), pick_dtype(options.dtype)
        if options.model == "reasoner" and device == "cpu":
            torch.set_num_threads(1)  # so small a model gains nothing from more
            dtype = dtype or "float32"
        self.model, self.tokenizer = load(options.model, device, dtype)
        self.device = torch.device(device)
        ids = [self.encode(batch) for seed in options.seeds for batch in self.batches(seed)]
        self.prompt_tokens = max(len(row) for batch in ids for row in batch)
        self.new_tokens = options.max_new_tokens or options.steps * task.TOKENS_PER_STEP
        # The last token that is generated is not attended to, and never comes in.
        seen = self.prompt_tokens + self.new_tokens - 1
        kind = str(self.model.dtype).removeprefix("torch.")
        shape = shape_of(self.model.config, dtype=kind)
        parts = (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize)
        place = Place(seen, self.prompt_tokens, *parts)
        self.room = Room(options.model, place, self.model.dtype, self.device)

    def batches(self, seed: int) -> list[list[Problem]]:
        """The problems of a seed: walks of its own, or those of the file, which are sampled."""
        options = self.options
        found = self.listed
        if self.walks:
            first = seed * options.count
            found = [self.walk(first + i) for i in range(options.count)]
        return [found[i : i + options.batch] for i in range(0, len(found), options.batch)]

    @cached_property
    def listed(self) -> list[Problem]:
        if self.walks:
            return []
        options = self.options
        if options.preset is not None:
            return PRESETS[options.preset].load(options.problems, options.count)
        return files.load(options.problems, checker=options.checker, count=options.count)

    def walk(self, seed: int) -> Problem:
        walk = task.make_problem(self.options.nodes, self.options.steps, seed)
        return Problem(f"walk-{seed}", walk.gold(), "steps", prompt=walk.prompt)

    def encode(self, problems: list[Problem]) -> list[list[int]]:
        if self.walks:
            return [self.tokenizer(problem.prompt)["input_ids"] for problem in problems]
        return files.encode(problems, self.tokenizer)

    def settings(self) -> dict[str, Any]:
        """What a result depends on, and a run that goes on must have in common with the first."""
        names = ("model", "checker", "batch", "temperature", "top_p", "top_k", "set", "count")
        walks = ("nodes", "steps") if self.walks else ()
        content = json.dumps([(p.id, p.line(), p.answer, p.checker) for p in self.listed])
        return {
            **{name: getattr(self.options, name) for name in (*names, *walks)},
            "problems": hashlib.sha256(content.encode()).hexdigest()[:16] if self.listed else None,
            "new_tokens": self.new_tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def calibrated(self, bound: int) -> float:
        """alpha for the reasoner, from two walks that are not graded."""
        tokens = bound // self.room.token_bytes
        return kvcomp.LazyEviction.calibrate(
            self.model,
            [self.walk(CALIBRATION_SEED + i).prompt for i in range(2)],
            tokenizer=self.tokenizer,
            max_new_tokens=self.new_tokens,
            budget=tokens - tokens // 4,
        ).alpha

    def decode(
        self, method: Method, kv: str, problems: list[Problem], seed: int, tick: Callable[[], None]
    ) -> tuple[list[Grade], list[int], Report, list[tuple[int, int]]]:
        """One batch under a method.

        Returns:
            the grades; how many tokens each answer has, to its end; the report; and (tokens
            generated, bytes of K and V that a sequence holds) now and then.
        """
        rows = self.encode(problems)
        width = max(map(len, rows))
        end = self.tokenizer.eos_token_id
        pad = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([[pad or 0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        transformers.set_seed(seed)
        with kvcomp.patch(self.model, method, kv=kv) as run:
            trace = _Trace(run, len(rows), max(1, self.new_tokens // LOOKS) | 1, tick)
            output = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=self.new_tokens,
                pad_token_id=pad,
                streamer=trace,
                **self.sampling(),
            )
        answers = [_until(row, self._ends()) for row in output[:, width:].tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        grades = [CHECKERS[p.checker](p, text) for p, text in zip(problems, texts, strict=True)]
        return grades, [len(answer) for answer in answers], run.report(), trace.seen

    def sampling(self) -> dict[str, Any]:
        """For `generate`; what was not asked for is the model's own."""
        options = self.options
        if options.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        asked = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
        asked = {name: value for name, value in asked.items() if value is not None}
        return asked | {"do_sample": True} if asked else {}

    def _ends(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        return set(end) if isinstance(end, list) else {end}


class _Trace(BaseStreamer):
    """What `generate` calls with the prompt and then at each step: looks at the cache."""

    def __init__(self, run: Any, rows: int, every: int, tick: Callable[[], None]) -> None:
        self.run, self.rows, self.every, self.tick = run, rows, every, tick
        self.seen: list[tuple[int, int]] = []
        self.tokens = -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens > 0:
            self.tick()
        if self.tokens > 0 and (self.tokens - 1) % self.every == 0:
            self.seen.append((self.tokens, self.run.report().kv_bytes_kept // self.rows))

    def end(self) -> None:
        pass


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Up to the first end and with it: behind it is padding."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
