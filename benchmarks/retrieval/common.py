"""What the parts share: a clock, and the shape of a real model."""

from __future__ import annotations

import time

import torch

QWEN3 = {  # 0.6B, but for layers and vocabulary
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
