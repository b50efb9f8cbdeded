"""What commands share: options, checks, and loading models."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvcomp import models
from kvcomp.cache.rows import KINDS
from kvcomp.checks import require_one_of
from kvcomp.cli.output import say_aside
from kvcomp.models import convert

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N; default: the GPU if there is one.", metavar="NAME"),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16; default: the model's own.", metavar="NAME"),
]
Kv = Annotated[
    str,
    typer.Option(
        help="Keep K and V as the model makes them (model) or in eight bits (int8).",
        metavar="KIND",
    ),
]


def pick_device(name: str | None) -> str:
    """The device `name`, if it is there; None: the GPU if there is one, else the CPU."""
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
    if name is not None:
        require_one_of(known, "kvcomp: --dtype", name)
    return name


def pick_kv(kind: str) -> str:
    require_one_of(KINDS, "kvcomp: --kv", kind)
    return kind


def load(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer from a folder, a GGUF file, the hub or a short name: the bundled
    "reasoner", or a model that `kvcomp get` has fetched."""
    from transformers import AutoConfig

    from kvcomp.hf.auto import auto_class

    source = find(name, "model")
    if (file := convert.gguf_file(source)) is not None:
        model, tokenizer = _from_gguf(file, name, dtype)
        return model.to(device).eval(), tokenizer
    tokenizer = load_tokenizer(name, "model")
    kind = auto_class(pretrained(AutoConfig, "model", name))
    model = pretrained(kind, "model", name, dtype=dtype or "auto")
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, what: str = "tokenizer") -> Any:
    from transformers import AutoTokenizer

    if (file := convert.gguf_file(find(name, what))) is not None:
        with _one_line(what, name):
            return convert.tokenizer(file)
    return pretrained(AutoTokenizer, what, name)


def find(name: str, what: str) -> str:
    """The folder of a short name, else the name itself, which must exist if it is a path."""
    source = models.resolve(name)
    is_path = source.startswith((".", "/")) or source.lower().endswith(".gguf")
    if is_path and not os.path.exists(source):
        raise ValueError(f"kvcomp: cannot load {what} {name!r}: no such folder or file")
    return source


def pretrained(kind: Any, what: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained` without progress bars or log lines, and with errors of one line."""
    source = find(name, what)
    if (file := convert.gguf_file(source)) is not None:
        convert.require()
        source, options["gguf_file"] = str(file.parent), file.name
    with _one_line(what, name):
        return kind.from_pretrained(source, **options)


def _from_gguf(file: Path, name: str, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file; standard error says how much memory they take."""
    with _one_line("model", name):
        model, tokenizer = convert.read(file, dtype=getattr(torch, dtype or "bfloat16"))
    bytes_there = sum(x.numel() * x.element_size() for x in model.parameters())
    say_aside(
        f"kvcomp: {file.name}: {file.stat().st_size / 2**20:.0f} MiB on disk, dequantised to"
        f" {bytes_there / 2**20:.0f} MiB of {model.dtype} in memory at each start"
    )
    return model, tokenizer


@contextlib.contextmanager
def _one_line(what: str, name: str) -> Iterator[None]:
    """Keep transformers quiet, and turn its errors into errors of one line."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its retries would bury the one line of ours
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever transformers makes of files that are not right
        said = str(error).strip()
        first = said.partition("\n")[0]  # some are very long
        reason = textwrap.shorten(said if first.endswith(":") else first, 240)
        if not isinstance(error, (OSError, ValueError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"kvcomp: cannot load {what} {name!r}: {reason}") from error
