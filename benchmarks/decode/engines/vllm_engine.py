"""vLLM's backend for CPUs, eager, K and V in bf16."""

from __future__ import annotations

import os
import time
from typing import Any

from worker import prompt

NAME = "vllm"


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="3",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="ERROR",
        )
        import vllm

        self.versions, self.rows, self.room = {NAME: vllm.__version__}, job["batch"], job["room"]
        self._sampling = vllm.SamplingParams
        self.engine = vllm.LLM(
            job["model"],
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=self.room,
            max_num_seqs=self.rows,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
        ).llm_engine
        self.asked: list[str] = []
        self.number = 0

    def _ask(self, ids: list[int], count: int) -> str:
        sampling = self._sampling(temperature=0, max_tokens=count, ignore_eos=True)
        self.number += 1
        name = str(self.number)
        self.engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        return name

    def greedy(self, ids: list[int], count: int) -> dict[str, list[int]]:
        self._ask(ids, count)
        found: list[int] = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found = list(output.outputs[0].token_ids)
        return {NAME: found}

    def stand(self, tokens: int) -> None:
        if self.asked:
            self.engine.abort_request(self.asked)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        left = self.room - tokens
        self.asked = [self._ask(prompt(row, tokens), left) for row in range(self.rows)]
        answered: set[str] = set()
        while len(answered) < self.rows:
            answered.update(output.request_id for output in self.engine.step())

    def step(self, name: str, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def parts(self, name: str) -> None:
        return None
