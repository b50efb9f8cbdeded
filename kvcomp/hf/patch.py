"""patch(model, method): run a model's `generate` and forward with a method."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvcomp.hf.chunked_run import ChunkedRun
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.methods import Delethink, Method


def patch(
    model: PreTrainedModel,
    method: Method,
    *,
    max_tokens: int | None = None,
    linear_rows: bool = True,
    kv: str = "model",
    kv_rotate: bool | None = None,
) -> Run:
    """Decode with `method` until `undo()`, or within a `with` block.

        with kvcomp.patch(model, kvcomp.Delta(budget=1024)) as run:
            out = model.generate(**inputs, max_new_tokens=16384)
        print(run.report())

    Args:
        model: a Hugging Face causal LM whose attention goes through `AttentionInterface`.
        method: a `Method`; the run counts what it reads and keeps.
        max_tokens: preallocate the cache for this many tokens, prompt and output together. Decode
            steps then compile to one graph: transformers compiles them on a GPU, and
            `run.compile()` does so for your own loops. See `kvcomp.hf.StaticRun`.
        linear_rows: on a CPU, send linear layers with at most 32 rows of input, as decode steps
            have them, through the op `linear_rows`, RMS norms through `norm_rows`, and rotary
            embeddings through `rotate_rows`. False leaves them to torch.
        kv: "int8" keeps K and V of the managed layers in eight bits, with an fp16 scale per token
            and KV head: about half the bytes, under any method. The first forward attends to exact
            K and V, what follows to those that are kept. "model": as the model makes them.
        kv_rotate: with kv="int8", turn keys and queries by a Hadamard matrix, which spreads what
            few channels hold. None: where the head size is a power of two, which it takes.

    Raises:
        TypeError: `model` is no transformers model, `method` no method, `max_tokens` no integer, or
            `linear_rows` no bool.
        ValueError: the model is already patched, needs something that the method cannot do exactly
            (an unsupported head size, a mask that encodes more than padding, ...), or the method's
            parameters do not fit its layers. The model stays as it was.
    """
    options: dict[str, Any] = {"linear_rows": linear_rows, "kv": kv, "kv_rotate": kv_rotate}
    if max_tokens is not None:
        return StaticRun(model, method, max_tokens, **options)
    if isinstance(method, Delethink):
        return ChunkedRun(model, method, **options)
    return Run(model, method, **options)
