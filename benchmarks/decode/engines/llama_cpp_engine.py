"""llama.cpp through its C interface, as llama-cpp-python binds it; fp16 weights."""

from __future__ import annotations

import time
from typing import Any

import llama_cpp as lib
import numpy as np
from worker import prompt

PIECE = 512  # tokens of a prompt at a time
# K and V, and flash attention, without which llama.cpp takes no quantised V.
SETTINGS = {
    "llama.cpp": (lib.GGML_TYPE_F16, False),
    "llama.cpp, flash": (lib.GGML_TYPE_F16, True),
    "llama.cpp, q8_0, flash": (lib.GGML_TYPE_Q8_0, True),
}


class Context:
    """The sequences of one setting."""

    def __init__(self, model: Any, job: dict[str, Any], kind: int, flash: bool) -> None:
        self.rows, self.seen = job["batch"], 0
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = job["room"] * self.rows, self.rows
        params.n_batch = params.n_ubatch = PIECE
        params.n_threads = params.n_threads_batch = job["threads"]
        params.type_k = params.type_v = kind
        params.kv_unified = False
        how = "ENABLED" if flash else "DISABLED"
        params.flash_attn_type = getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{how}")
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("llama.cpp gives no context")
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(PIECE, 0, 1)
        self.ids = [0] * self.rows

    def append(self, rows: list[int], ids: list[int]) -> None:
        """One row and its tokens, or a token for each row; logits of the last, or of all."""
        batch, one = self.batch, len(rows) == 1
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.n_seq_id[i] = token, 1
            batch.pos[i] = self.seen + i if one else self.seen
            batch.seq_id[i][0] = rows[0] if one else rows[i]
            batch.logits[i] = not one or i == len(ids) - 1
        if lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.seen += len(ids) if one else 1
        asked = range(len(ids)) if not one else [len(ids) - 1]
        self.ids[: len(asked)] = [self._greedy(i) for i in asked]

    def _greedy(self, at: int) -> int:
        logits = lib.llama_get_logits_ith(self.context, at)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocabulary,))))

    def fill(self, ids: list[int]) -> None:
        for first in range(0, len(ids), PIECE):
            self.append([0], ids[first : first + PIECE])

    def stand(self, tokens: int, before: int) -> None:
        """Row 0 keeps `before` tokens and reads on; the others are copies of it."""
        lib.llama_memory_seq_rm(self.memory, 0, before, -1)
        self.seen = before
        self.fill(prompt(0, tokens)[before:])
        for row in range(1, self.rows):
            lib.llama_memory_seq_rm(self.memory, row, -1, -1)
            lib.llama_memory_seq_cp(self.memory, 0, row, -1, -1)
        self.ids = [self.ids[0]] * self.rows

    def step(self) -> None:
        self.append(list(range(self.rows)), self.ids)

    def clear(self) -> None:
        lib.llama_memory_clear(self.memory, True)
        self.seen = 0


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self.versions = dict.fromkeys(SETTINGS, lib.__version__)
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, None)
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(job["gguf"].encode(), settings)
        if not model:
            raise RuntimeError("llama.cpp does not load the model")
        self.contexts = {name: Context(model, job, *how) for name, how in SETTINGS.items()}
        self.tokens = 0

    def greedy(self, ids: list[int], count: int) -> dict[str, list[int]]:
        found = {}
        for name, context in self.contexts.items():
            context.fill(ids)
            found[name] = [context.ids[0]]
            while len(found[name]) < count:
                context.append([0], [context.ids[0]])
                found[name].append(context.ids[0])
            context.clear()
        self.tokens = 0
        return found

    def stand(self, tokens: int) -> None:
        for context in self.contexts.values():
            context.stand(tokens, self.tokens)
        self.tokens = tokens

    def step(self, name: str, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.contexts[name].step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def parts(self, name: str) -> None:
        return None
