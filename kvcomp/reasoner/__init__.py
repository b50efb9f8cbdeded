"""The bundled reasoner: a tiny reasoning model, and the task that it was trained for.

``path()`` is the directory of the weights; ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it
like any other model. Nothing in here imports torch or transformers.

Qwen3 architecture, 8 layers, 1.6 M parameters, trained for this one task by
``benchmarks/train_reasoner.py``. Layer 0 looks a few tokens back, layer 2 attends to the needed
fact but writes nothing itself, and layer 5 reads it. Without the attention of any other layer it
works as well.
"""

from pathlib import Path

from . import task

__all__ = ["path", "task"]


def path() -> str:
    """Directory of the bundled model: config, bf16 safetensors and tokenizer."""
    return str(Path(__file__).parent / "model")
