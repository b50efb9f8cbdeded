"""patch(model, method): put a method under a model's `generate` and forward."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvcomp.hf.chunked_run import ChunkedRun
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.methods import Delethink, Method


def patch(model: PreTrainedModel, method: Method, *, max_tokens: int | None = None) -> Run:
    """Decode with `method` until `undo()`, or within a `with` block.

        with kvcomp.patch(model, kvcomp.Delta(budget=1024)) as run:
            out = model.generate(**inputs, max_new_tokens=16384)
        print(run.report())

    Args:
        model: a Hugging Face causal LM whose attention goes through `AttentionInterface`.
        method: a `Method`; its figures are counted by the run.
        max_tokens: prompt and output, if the cache is to be of one size from the start. Decode
            steps then compile as one graph: transformers does so by itself on a GPU, and
            `run.compile()` does for loops of one's own. See `kvcomp.hf.StaticRun`.

    Raises:
        TypeError: not a transformers model, not a method, or `max_tokens` not a whole number.
        ValueError: the model is patched already, or does what a method cannot do exactly
            (soft-capped logits, latent attention, an unsupported head size), or the method's
            parameters do not fit its layers. The model is as before.
    """
    if max_tokens is not None:
        return StaticRun(model, method, max_tokens)
    if isinstance(method, Delethink):
        return ChunkedRun(model, method)
    return Run(model, method)
