"""GGUF to a Hugging Face folder: dequantised, in bfloat16."""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvcomp.models import gguf_digits, gguf_tokens

NEEDED = ("transformers", "gguf", "accelerate")  # what transformers reads a GGUF file with


def require() -> None:
    """Raise ModuleNotFoundError where a package for reading GGUF files is missing."""
    for name in NEEDED:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"no module named {name!r}", name=name)


def tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, with its special tokens and its way to split digits.

    Raises:
        ModuleNotFoundError: gguf, accelerate or transformers is missing.
    """
    require()
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    fields = GGUFReader(file).fields
    gguf_tokens.restore(found, fields)
    gguf_digits.split(found, fields)
    return found


def read(file: Path, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, all weights dequantised.

    Args:
        options: of `from_pretrained`, such as dtype.

    Raises:
        ModuleNotFoundError: gguf, accelerate or transformers is missing.
    """
    require()
    import transformers

    where: dict[str, Any] = {"gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting turns off
        words = tokenizer(file)
        if hasattr(transformers, "GgufConfig"):  # where it could leave weights packed
            where["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **where, **options)
    return model, words


def gguf_file(source: str) -> Path | None:
    """The GGUF file that `source` is, or that a folder holds in place of a Hugging Face model.

    Raises:
        ValueError: a folder with several of them and no config.json.
    """
    place = Path(source)
    if place.suffix.lower() == ".gguf" and place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").exists():
        return None
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"kvcomp: model: expected a folder with one GGUF file, got {names}: name one of them"
        )
    return files[0] if files else None


def convert(file: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file into the folder `target`, weights in bf16.

    Raises:
        OSError: they cannot be written.
    """
    import torch
    from safetensors import SafetensorError

    packed, words = read(file, dtype=torch.bfloat16)
    config, state = packed.config, packed.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or it cannot be saved: the weights are plain already
    with torch.device("meta"):
        model = type(packed)(config)
    model.load_state_dict(state, strict=False, assign=True)  # tied weights may be in it once
    model.tie_weights()
    if left := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise RuntimeError(f"kvcomp.models: {file.name} has no weights for {', '.join(left)}")
    model.generation_config = packed.generation_config
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(target)
    except SafetensorError as error:  # a full disk, which safetensors does not call an OSError
        raise OSError(str(error)) from error
    words.save_pretrained(target)
