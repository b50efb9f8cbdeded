"""Part `packed` of bench_thinking.py: prompts of several lengths, packed, padded, one by one.

Padded are all to the longest, or pairs of like lengths to the longer; and all once more by
transformers alone, on a copy of the model that kvcomp does not patch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kvcomp
from harness.memory import peak
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
    last = {"use_cache": True, "logits_to_keep": 1}
    pairs = [rows[place : place + 2] for place in range(0, len(rows), 2)]
    stock = deepcopy(model)
    with kvcomp.patch(model, kvcomp.Full()) as run, torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {
            "padded": lambda: model(**padded(rows), **last),
            "padded, transformers": lambda: stock(**padded(rows), **last),
            "padded in pairs": lambda: [model(**padded(pair), **last) for pair in pairs],
            "one by one": lambda: [model(row[None], **last) for row in rows],
            "packed": lambda: prefill(run, [row.tolist() for row in rows]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        peaks: dict[str, int] = {}  # of the last round
        for _ in range(options.rounds):
            for name, call in calls.items():
                peaks[name] = peak(lambda call=call, found=seconds[name]: timed(call, found))
    longest, of_pairs = max(lengths), sum(2 * max(map(len, pair)) for pair in pairs)
    tokens = {name: len(lengths) * longest for name in calls if "padded" in name}
    tokens["padded in pairs"] = of_pairs
    base = seconds["padded"]
    return [
        {
            "part": "packed",
            "contender": name,
            "tokens": tokens.get(name, sum(lengths)),
            "seconds": statistics.median(each),
            "ratio": statistics.median(base) / statistics.median(each),
            "ratio_min": min(base) / min(each),
            "peak_bytes": peaks[name],
        }
        for name, each in seconds.items()
    ]


def timed(call: Callable[[], Any], seconds: list[float]) -> None:
    began = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - began)


def padded(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of ids [n] as a model takes them, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor([len(row) for row in rows])[:, None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": places}
