"""kvcomp and stock transformers, on caches that are filled instead of a prefill."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

import kvcomp
from decode.contenders import STOCK, Contender, Filling, OneSize, Patched
from decode.steps import split
from kvcomp.hf import Run, StaticRun

EAGER, INT8, COMPILED = "kvcomp", "kvcomp, int8", "kvcomp, compiled"
LOOKED_INTO = 4  # steps whose calls are timed


class EightBits(Patched):
    def _patch(self, method: kvcomp.Method) -> Run:
        return kvcomp.patch(self.model, method, kv="int8")


class Compiled(OneSize):
    """Compiles in its first step, once for all fillings."""

    compiled: Callable | None = None

    def _patch(self, method: kvcomp.Method) -> StaticRun:
        run = super()._patch(method)
        self.compiled = run.compile(fullgraph=True)
        return run

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        return self.compiled(ids, past_key_values=self.cache).logits


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.job = job
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.bfloat16
        ).eval()
        ours = [EAGER, INT8, COMPILED] if job["compile"] else [EAGER, INT8]
        self.versions = dict.fromkeys(ours, kvcomp.__version__) | {STOCK: transformers.__version__}
        self.contenders: dict[str, Contender] = {}
        self.ids: dict[str, Tensor] = {}

    def greedy(self, ids: list[int], count: int) -> dict[str, list[int]]:
        """The prompt in one forward and a step for each token, on empty caches."""
        self._stand(Filling.make(self.model, 1, 1, 0))
        found, prompt = {}, torch.tensor([ids])
        for name, contender in self.contenders.items():
            ours = isinstance(contender, Patched)
            contender.cache = contender.run.new_cache() if ours else DynamicCache()
            with torch.no_grad():
                out = contender.model(prompt, past_key_values=contender.cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            found[name] = [int(token)]
            while len(found[name]) < count:
                token = contender.step(token)[:, -1:].argmax(-1)
                found[name].append(int(token))
        return found

    def stand(self, tokens: int) -> None:
        self._stand(Filling.make(self.model, self.job["batch"], tokens, 0))
        self.ids = dict.fromkeys(self.versions, self.filling.ids[:, -1:])

    def _stand(self, filling: Filling) -> None:
        self.filling = filling
        for name in self.versions:
            kept = self.contenders.get(name)
            if isinstance(kept, Compiled):
                kept.fill(filling)
                continue
            if kept is not None:
                kept.close()
            self.contenders[name] = self._make(name, filling)

    def _make(self, name: str, filling: Filling) -> Contender:
        if name == STOCK:
            return Contender(name, self.model, DynamicCache(config=self.model.config), filling)
        if name == COMPILED:
            return Compiled(kvcomp.Full(), self.model, filling, self.job["room"])
        return {EAGER: Patched, INT8: EightBits}[name](kvcomp.Full(), self.model, filling)

    def step(self, name: str, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.ids[name] = self.contenders[name].step(self.ids[name])[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
        return seconds

    def parts(self, name: str) -> dict[str, float] | None:
        """Of the eager steps; the compiled one shows none."""
        if name == COMPILED:
            return None
        return split(self.contenders[name], self.filling, LOOKED_INTO)
