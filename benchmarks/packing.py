"""Part `packed` of bench_thinking.py: prompts of several lengths, packed, padded, one by one."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kvcomp
from kvcomp import models
from kvcomp.hf.prefill import prefill


def packed(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds until the K and V of all prompts are in a cache, contenders in turn."""
    if options.text:
        path = models.resolve(options.text)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    lengths = [
        min(length, 8 * options.steps) for length in (64, 96, 160, 256, 400, 640, 1024, 2048)
    ]
    words = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, words, (n,), generator=generator) for n in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    seconds: dict[str, list[float]] = {"padded": [], "one by one": [], "packed": []}
    with kvcomp.patch(model, kvcomp.Full()) as run, torch.no_grad():
        last = {"use_cache": True, "logits_to_keep": 1}
        calls: dict[str, Callable[[], Any]] = {
            "padded": lambda: model(ids, attention_mask=mask.long(), position_ids=places, **last),
            "one by one": lambda: [model(row[None], **last) for row in rows],
            "packed": lambda: prefill(run, [row.tolist() for row in rows]),
        }
        for _ in range(options.rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    base = seconds["padded"]
    return [
        {
            "part": "packed",
            "contender": name,
            "tokens": len(lengths) * longest if name == "padded" else sum(lengths),
            "seconds": statistics.median(each),
            "ratio": statistics.median(base) / statistics.median(each),
            "ratio_min": min(base) / min(each),
        }
        for name, each in seconds.items()
    ]
