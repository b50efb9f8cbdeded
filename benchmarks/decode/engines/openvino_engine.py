"""OpenVINO GenAI's continuous batching, K and V in u8, which is its default on x86."""

from __future__ import annotations

import math
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import prompt

NAME = "openvino, u8"


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self.versions = {NAME: version("openvino-genai")}
        self.rows, self.room, self.number = job["batch"], job["room"], 0
        plan = genai.SchedulerConfig()
        plan.cache_size = math.ceil(self.rows * self.room * 32e3 / 2**30)  # GiB, twice the need
        plan.max_num_seqs, plan.max_num_batched_tokens = self.rows, 2048
        plan.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": job["threads"],
            "KV_CACHE_PRECISION": ov.Type.u8,
        }
        self.pipeline = genai.ContinuousBatchingPipeline(job["gguf"], plan, "CPU", properties)
        self.handles: list[Any] = []

    def _ask(self, ids: list[int], count: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        self.number += 1
        return self.pipeline.add_request(self.number, ov.Tensor(np.array([ids], np.int64)), config)

    def greedy(self, ids: list[int], count: int) -> dict[str, list[int]]:
        handle = self._ask(ids, count)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return {NAME: list(handle.read_all()[0].generated_ids)}

    def stand(self, tokens: int) -> None:
        for handle in self.handles:
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        self.handles = [self._ask(prompt(row, tokens), self.room) for row in range(self.rows)]
        waiting = list(self.handles)
        while waiting:
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]

    def step(self, name: str, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.pipeline.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def parts(self, name: str) -> None:
        return None
