"""What clustering and offloading add to a prompt."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kvcomp
from kvcomp import Method
from ops.common import DTYPES
from retrieval.common import QWEN3, now


@dataclass(frozen=True)
class PrefillRow:
    """Seconds: until the logits are there, and until the layers have settled as well."""

    part: str
    method: str
    dtype: str
    tokens: int
    layers: int
    forward_s: float
    ready_s: float
    ready_s_min: float
    overhead: float | None = None  # of ready_s over Full's
    overhead_min: float | None = None

    def line(self) -> str:
        more = (
            ""
            if self.overhead is None
            else f"  {self.overhead:+.1%} (min {self.overhead_min:+.1%})"
        )
        return (
            f"{self.dtype}  {self.method:24} {self.tokens} tokens, {self.layers} layers"
            f"  forward {self.forward_s:6.2f} s  settled {self.ready_s:6.2f} s{more}"
        )


def bench_prefill(options: argparse.Namespace) -> Iterator[PrefillRow]:
    from transformers import AutoConfig, AutoModelForCausalLM

    methods = {"full": kvcomp.Full()} | {
        f"louis-kv, {n} iterations": kvcomp.LouisKV(dense_layers=0, iterations=n)
        for n in options.iterations
    }
    shape = QWEN3 | {"num_hidden_layers": options.layers, "tie_word_embeddings": True}
    if options.smoke:
        shape |= {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen3", **shape)
    tokens = torch.randint(shape["vocab_size"], (1, options.tokens), device=options.device)
    for name in options.dtype:
        torch.manual_seed(options.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[name]).eval()
        model.to(options.device)
        samples: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        order = random.Random(options.seed)
        for turn in range(options.repeats + 1):
            for method in order.sample(list(methods), len(methods)):
                if turn or method == "full":  # once, to warm up
                    samples[method].append(_prefill(model, methods[method], tokens))
        samples["full"].pop(0)
        full = samples["full"]
        for method, taken in samples.items():
            forward, ready = (statistics.median(x) for x in zip(*taken, strict=True))
            least = min(x for _, x in taken)
            row = PrefillRow(
                "prefill", method, name, options.tokens, options.layers, forward, ready, least
            )
            if method != "full":
                row = replace(
                    row,
                    overhead=ready / statistics.median(x for _, x in full) - 1,
                    overhead_min=least / min(x for _, x in full) - 1,
                )
            yield row


@torch.inference_mode()
def _prefill(model: torch.nn.Module, method: Method, tokens: Tensor) -> tuple[float, float]:
    with kvcomp.patch(model, method) as run:
        cache, device = run.new_cache(), tokens.device.type
        start = now(device)
        model(tokens, past_key_values=cache, logits_to_keep=1)
        forward = now(device)
        for layer in cache.kv.layers:
            layer.settle()
        return forward - start, now(device) - start
