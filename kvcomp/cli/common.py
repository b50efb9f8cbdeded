"""What commands share: options, checks, and loading models."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from kvcomp import METHODS, Method, models
from kvcomp.models import convert

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.", metavar="NAME")
]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", metavar="NAME")]


def pick_device(name: str | None) -> str:
    """The device asked for, if it is there; without a wish, the GPU where there is one."""
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"kvcomp: --device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count() * gpu:
        raise ValueError(f"kvcomp: --device: torch finds no GPU {name!r} here")
    return str(device)


def pick_dtype(name: str | None) -> str | None:
    known = ("float32", "float16", "bfloat16")
    if name is not None and name not in known:
        raise ValueError(f"kvcomp: --dtype: expected one of {', '.join(known)}, got {name!r}")
    return name


def pick_method(name: str) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"kvcomp: --method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def output_console() -> Console:
    """Tables in a pipe or a file are not folded to the 80 columns that rich would assume."""
    return Console(width=None if sys.stdout.isatty() else 120)


def check_output(file: Path | None) -> None:
    """Minutes of work should not end at a folder that does not exist."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"kvcomp: cannot write {str(file)!r}: no such folder, or it is one")


def load(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer: from a folder, a GGUF file, the hub, what `kvcomp get` has fetched, or
    the box ("reasoner")."""
    from transformers import AutoModelForCausalLM

    source = find(name, "model")
    if (file := convert.gguf_file(source)) is not None:
        model, tokenizer = _from_gguf(file, name, dtype)
        return model.to(device).eval(), tokenizer
    tokenizer = load_tokenizer(name, "model")
    model = pretrained(AutoModelForCausalLM, "model", name, dtype=dtype or "auto")
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, what: str = "tokenizer") -> Any:
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer, what, name)


def find(name: str, what: str) -> str:
    """The folder behind a short name, else the name; of a path, whether it is there."""
    source = models.resolve(name)
    if source.startswith((".", "/")) and not Path(source).exists():
        raise ValueError(f"kvcomp: cannot load {what} {name!r}: no such folder or file")
    return source


def pretrained(kind: Any, what: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained`, quiet, and with one line for what goes wrong."""
    source = find(name, what)
    if (file := convert.gguf_file(source)) is not None:
        convert.require()
        source, options["gguf_file"] = str(file.parent), file.name
    with _one_line(what, name):
        return kind.from_pretrained(source, **options)


def _from_gguf(file: Path, name: str, dtype: str | None) -> tuple[Any, Any]:
    """With a line on standard error about the memory that it takes: the weights are not packed."""
    with _one_line("model", name):
        model, tokenizer = convert.read(file, dtype=getattr(torch, dtype or "bfloat16"))
    bytes_there = sum(x.numel() * x.element_size() for x in model.parameters())
    print(
        f"kvcomp: {file.name}: {file.stat().st_size / 2**20:.0f} MiB on disk, dequantised to"
        f" {bytes_there / 2**20:.0f} MiB of {model.dtype} in memory; each start does so anew",
        file=sys.stderr,
    )
    return model, tokenizer


@contextlib.contextmanager
def _one_line(what: str, name: str) -> Iterator[None]:
    """transformers is quiet, and what goes wrong in it becomes one line."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its retries would bury the one line of ours
    try:
        yield
    except ModuleNotFoundError:
        raise
    except (OSError, ValueError, ImportError) as error:  # messages of many lines, some very long
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 240)
        raise ValueError(f"kvcomp: cannot load {what} {name!r}: {reason}") from error
