"""The bundled reasoner: a tiny real reasoning model, and the task that it was trained for.

``path()`` is the directory of the weights; ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it
like any other model. Importing this package imports neither torch nor transformers.
"""

from pathlib import Path

from . import task

__all__ = ["path", "task"]


def path() -> str:
    """Directory of the bundled model: config, bf16 safetensors and tokenizer."""
    return str(Path(__file__).parent / "model")
