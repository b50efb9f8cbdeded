"""One sequence decoded under one method for as long as is asked, and what is seen on the way.

The tokens are given and not sampled, so that all methods read the same text, and nothing ends it.
Notes go into one table that is there from the start: what is to be found is whether anything else
grows.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvcomp
from harness.memory import Memory
from kvcomp import Delethink, Method
from kvcomp.cache import KVCache
from kvcomp.hf.cache import Cache
from long_run.first_layer import FirstLayer, resident_rows_are_the_pools

FIELDS = (
    "tokens",  # decoded
    "seen",  # what the cache says that it has seen
    "rope",  # position by which the newest token was rotated
    "drift",  # largest difference of any such position since the last look from where it belongs
    "kept",  # tokens of the longest row of a layer
    "held",  # bytes of K and V in use on the device
    "reserved",  # bytes of the slabs
    "notes",  # bytes of what the method remembers on the device
    "host",  # bytes of K and V in host memory, spare room included
    "tensors",  # bytes of all tensors of the process, these included
    "rss",  # resident memory of the process
    "objects",  # that Python's garbage collector knows
    "blocks",  # of memory that Python has handed out: also for numbers and strings
    "foreseen",  # share of the given tokens that the model would have chosen
    "ms",  # median of a step
)
CHECKED = ("rows", "error", "shifted")  # see `first_layer.Finding`; rows 0: not looked at
REAL = ("foreseen", "ms", "error", "shifted")  # all others are whole numbers


@dataclass
class Log:
    """What was noted, [looks, fields]."""

    method: Method
    table: np.ndarray
    looks: int = 0

    def rows(self) -> list[dict]:
        kinds = {name: float if name in REAL else int for name in (*FIELDS, *CHECKED)}
        return [
            {name: kind(x) for (name, kind), x in zip(kinds.items(), row, strict=True)}
            for row in self.table[: self.looks].round(6)
        ]


def position(method: Method, prompt: int, index: int) -> int:
    """Where token `index` of the output belongs in its context.

    Under Delethink the last token of a chunk is already the last one of the next context's carry.
    """
    if not isinstance(method, Delethink) or index < method.chunk - 1:
        return prompt + index
    fresh = method.chunk - method.carry
    return prompt + method.carry - 1 + (index - method.chunk + 1) % fresh


def context(method: Method, prompt: Tensor, output: Tensor, length: int) -> Tensor:
    """The ids of a context of `length` tokens, once `output` has come in."""
    if len(prompt) + len(output) == length:
        return torch.cat([prompt, output])
    begun = torch.cat([prompt, output[: method.head]])
    return torch.cat([begun, output[len(output) - (length - len(begun)) :]])


def decode(
    model: PreTrainedModel,
    method: Method,
    prompt: Tensor,
    stream: Tensor,
    *,
    every: int,
    checks: int,
    looked: Callable[[Log], None] = lambda log: None,
) -> Log:
    """
    Args:
        model: on the CPU, not patched.
        prompt, stream: ids, [n].
        every: tokens between looks.
        checks: the cache is compared with the first layer at every so many looks.
        looked: is called behind each look.
    """
    log = Log(method, np.zeros((len(stream) // every, len(FIELDS) + len(CHECKED))))
    reference = FirstLayer(model, prompt)
    steps = _Steps(model, len(stream))
    with torch.inference_mode(), kvcomp.patch(model, method) as run, steps, _memory() as memory:
        cache = run.new_cache()
        model(prompt[None], past_key_values=cache)
        for count in range(1, len(stream) + 1):
            steps.take(stream[count - 1 : count], count - 1, cache)
            if count % every:
                continue
            context_cache = getattr(cache, "context", cache)
            kv: KVCache = context_cache.kv
            row = log.table[log.looks]
            belongs = [position(method, len(prompt), i) for i in range(count - every, count)]
            row[: len(FIELDS)] = [
                count,
                cache.get_seq_length(),
                *steps.places(belongs, count),
                *_bytes(kv),
                *_beside_text(memory, context_cache),
                *_python(),
                *steps.answers(stream, count - every, count),
            ]
            if (log.looks + 1) % checks == 0:
                row[len(FIELDS) :] = _check(kv, method, reference, stream[:count])
            log.looks += 1
            looked(log)
    return log


def _beside_text(memory: Memory, cache: Cache) -> Iterator[int]:
    """What `memory` sees, without the ids of the text, which may grow: 8 bytes a token."""
    tensors, *others = memory.look()
    yield tensors - cache.text.nbytes
    yield from others


@contextlib.contextmanager
def _memory() -> Iterator[Memory]:
    try:
        yield Memory("cpu")
    finally:
        gc.unfreeze()


def _check(
    kv: KVCache, method: Method, reference: FirstLayer, output: Tensor
) -> tuple[int, float, float]:
    """In a function of its own, as what it makes must be gone when memory is looked at."""
    assert resident_rows_are_the_pools(kv)
    length = int(kv.layers[0].logical_lens)
    finding = reference.compare(kv, context(method, reference.prompt, output, length), method)
    return finding.rows, finding.error, finding.shifted


class _Steps:
    """Decode steps, with what is noted of each in memory that is there from the start."""

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self.model = model
        self._rope = np.zeros(count, np.int64)
        self._chosen = torch.zeros(count, dtype=torch.int64)
        self._seconds = np.zeros(count)
        self._latest: Tensor | None = None

    def __enter__(self) -> None:
        """Listen to the positions that rotate: the last that a step asks for are its token's."""

        def listen(_: torch.nn.Module, args: tuple, given: dict) -> None:
            self._latest = given["position_ids"] if "position_ids" in given else args[1]

        rotary = self.model.get_decoder().rotary_emb
        self._hook = rotary.register_forward_pre_hook(listen, with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def take(self, token: Tensor, index: int, cache: object) -> None:
        """Decode one token [1], the output's number `index`."""
        began = time.perf_counter()
        logits = self.model(token[None], past_key_values=cache).logits
        self._seconds[index] = time.perf_counter() - began
        self._rope[index] = self._latest[0, -1]
        self._chosen[index] = logits[0, -1].argmax()

    def places(self, belongs: list[int], count: int) -> Iterator[int]:
        """The newest position, and the largest difference from `belongs`."""
        rope = self._rope[count - len(belongs) : count]
        yield rope[-1]
        yield np.abs(rope - belongs).max()

    def answers(self, stream: Tensor, first: int, last: int) -> Iterator[float]:
        following = stream[first + 1 : last + 1]
        yield (self._chosen[first : first + len(following)] == following).float().mean().item()
        yield statistics.median(self._seconds[first:last].tolist()) * 1e3


def _bytes(kv: KVCache) -> Iterator[int]:
    layers = [layer for each in (kv, *kv.beside) for layer in each.layers if layer.capacity]
    yield max(layer.max_len for layer in layers)
    yield sum(int(layer.seq_lens.sum()) * layer.slot_bytes for layer in layers)
    yield sum(layer.keys.untyped_storage().nbytes() * 2 for layer in layers)
    notes = [x for layer in layers for x in (*layer.slots.values(), *layer.state.values())]
    indices = sum(layer.hosted.index.nbytes for layer in layers if layer.is_hosted)
    yield sum(tensor.untyped_storage().nbytes() for tensor in notes) + indices
    yield sum(layer.hosted.pool.nbytes for layer in layers if layer.is_hosted)


def _python() -> Iterator[int]:
    gc.collect()
    yield len(gc.get_objects())
    yield sys.getallocatedblocks()
