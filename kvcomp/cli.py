"""The command line: kvcomp info | demo | generate | trace.

Every error that a user can cause is one line on standard error and exit code 2.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    print(
        f"kvcomp: error: the command line needs {missing.name}: pip install 'kvcomp[hf]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import torch

from kvcomp import METHODS, Method, reasoner
from kvcomp.reasoner import task

app = typer.Typer(
    add_completion=False,
    help="Kernels and methods that make long chains of thought cheap to decode.",
    rich_markup_mode=None,
)

# What typer raises for a bad command line. typer has its own copy of click from some version on,
# so the class is taken from where both have it: BadParameter, UsageError, ClickException.
UsageProblem = typer.BadParameter.__mro__[2]

# Module -> the extra that brings it; the others are in [hf].
PROVIDERS = {"matplotlib": "bench", "openai": "trace"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)
    try:
        return command.main(args, prog_name="kvcomp", standalone_mode=False) or 0
    except UsageProblem as error:
        return _fail(error.format_message())
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "kvcomp":
            raise
        extra = PROVIDERS.get(error.name, "hf")
        return _fail(f"this needs {error.name}: pip install 'kvcomp[{extra}]'")
    except typer.Abort:  # Ctrl-C, in versions of typer that do not turn it into an exit code
        return 130
    except (ValueError, TypeError, RuntimeError) as error:
        if not str(error).lower().startswith("kvcomp"):
            raise  # not one of ours but a bug, which needs its traceback
        return _fail(str(error).removeprefix("kvcomp.").removeprefix("kvcomp: "))


def _fail(message: str) -> int:
    print("kvcomp: error:", " ".join(message.split()), file=sys.stderr)
    return 2


# --- options that commands share ------------------------------------------------------------------

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


def all_methods() -> list[str]:
    """Dense attention first, then the methods, then the other baselines."""
    return sorted(METHODS, key=lambda name: (name != "full", METHODS[name].baseline))


def main_methods() -> list[str]:
    """The methods, between dense attention and what is drawn at random."""
    shown = ("full", "random-pages", "random-eviction")
    return [name for name in all_methods() if name in shown or not METHODS[name].baseline]


def output_console() -> Console:
    """Tables in a pipe or a file are not folded to the 80 columns that rich would assume."""
    return Console(width=None if sys.stdout.isatty() else 120)


def check_output(file: Path | None) -> None:
    """Minutes of work should not end at a folder that does not exist."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"kvcomp: cannot write {str(file)!r}: no such folder, or it is one")


# --- commands -------------------------------------------------------------------------------------


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Versions, devices, and which implementation of each op runs where."""
    from kvcomp.info import gather, tables

    found = gather()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = output_console()
    for table in tables(found):
        console.print(table)
        console.print()


@app.command()
def demo(
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="By name; repeat for several, or 'all'. Default: the methods, dense, and random.",
            metavar="NAME",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens per layer; default: half of the final context.", min=1),
    ] = None,
    problems: Annotated[int, typer.Option(help="Problems, decoded as one batch.", min=1)] = 8,
    nodes: Annotated[
        int, typer.Option(help="Size of a problem: 2 facts a node.", min=2, max=len(task.NAMES))
    ] = 16,
    steps: Annotated[int, typer.Option(help="Reasoning steps, 4 tokens each.", min=1)] = 256,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Of the problems.", min=0)] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write meta and rows.", metavar="FILE")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a PNG.", metavar="FILE")
    ] = None,
) -> None:
    """Decode problems of the bundled reasoner with several methods, and compare."""
    names = list(dict.fromkeys(method)) if method else main_methods()
    if names == ["all"]:
        names = all_methods()
    for name in names:
        pick_method(name)
    for file in (json_file, plot_file):
        check_output(file)
    where, kind = pick_device(device), pick_dtype(dtype)
    if plot_file is not None:
        import matplotlib  # noqa: F401  (better missed now than after the work)
    from kvcomp import demo as work

    result = work.run(
        names,
        work.Settings(problems, nodes, steps, seed, budget, where, kind),
        Console(stderr=True),
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if plot_file is not None:
        work.plot(result, plot_file)
    console = output_console()
    console.print(work.headline(result), highlight=False)
    console.print(work.table(result))


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Argument(help="A folder or hub name of a causal LM; 'reasoner' is the bundled one."),
    ],
    prompt: Annotated[str, typer.Option(help="The text, or - for standard input.")],
    method: Annotated[str, typer.Option(help="By name.", metavar="NAME")] = "delta",
    budget: Annotated[
        int | None, typer.Option(help="Tokens per layer; default: the method's own.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Of delethink: tokens that the first chunk generates.")
    ] = None,
    carry: Annotated[
        int | None, typer.Option(help="Of delethink: tokens carried on; default: half a chunk.")
    ] = None,
    inner: Annotated[
        str | None,
        typer.Option(help="Of delethink: the method within a chunk, whose budget it is."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another field of the method, or of inner: inner.FIELD=VALUE.",
            metavar="FIELD=VALUE",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 4096,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the model's own.", min=0.0)
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    chat: Annotated[
        bool, typer.Option(help="Use the tokenizer's chat template where it has one.")
    ] = True,
) -> None:
    """Stream text from a model under a method; the report goes to standard error."""
    chunks = {"chunk": chunk, "carry": chunk // 2 if chunk and carry is None else carry}
    chosen = build_method(method, model, budget, settings or [], chunks, inner)
    sampling = pick_sampling(temperature, top_p)
    where, kind = pick_device(device), pick_dtype(dtype)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("kvcomp: --prompt: expected some text, got none")

    import transformers

    from kvcomp.hf import patch

    network, tokenizer = load(model, where, kind)
    inputs = encode(tokenizer, text, chat).to(where)
    transformers.set_seed(seed)
    with patch(network, chosen) as run:
        try:
            network.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                streamer=transformers.TextStreamer(
                    tokenizer, skip_prompt=True, skip_special_tokens=True
                ),
                **sampling,
            )
        except KeyboardInterrupt:  # enough seen: the report is of what was decoded
            print()
    print(run.report(), file=sys.stderr)


def build_method(
    name: str,
    model: str,
    budget: int | None,
    settings: list[str],
    chunks: dict[str, int | None],
    inner: str | None,
) -> Method:
    """The method `name` as published for the model, with what the command line asks for."""
    cls = pick_method(name)
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    if inner is not None:
        own = [text for text in settings if not text.startswith("inner.")]
        rest = [text.removeprefix("inner.") for text in settings if text not in own]
        given["inner"] = build_method(inner, model, budget, rest, {}, None)
        budget, settings = None, own
    options = {name: value for name, value in chunks.items() if value is not None}
    for option, value in (options if budget is None else {**options, "budget": budget}).items():
        if option not in fields:
            raise ValueError(f"kvcomp: --{option}: method {name!r} has none")
        given[option] = value
    if "inner" in given and "inner" not in fields:
        raise ValueError(f"kvcomp: --inner: method {name!r} has none")
    for setting in settings:
        field, _, text = setting.partition("=")
        if field not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"kvcomp: --set: {name!r} has no field {field!r}; it has: {known}")
        given[field] = parse(setting, fields[field], text)
    return cls.for_model(model, **given)


def parse(setting: str, hint: Any, text: str) -> Any:
    """`text` as a value of a field's type: a number, word, flag, tuple (1,2,3) or none."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    if type(None) in options and text.lower() == "none":
        return None
    kind = next(option for option in options if option is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(typing.get_args(kind)[0](part) for part in text.split(","))
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
    except (ValueError, KeyError):
        pass
    raise ValueError(
        f"kvcomp: --set {setting}: expected a value of type {getattr(hint, '__name__', hint)}"
    )


def pick_sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """What to tell `generate`; nothing, where nothing was asked: the model has its own defaults."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    asked = {"temperature": temperature, "top_p": top_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    return asked | {"do_sample": True} if asked else {}


def load(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, from a folder, the hub, or the box ("reasoner")."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, "model")
    model = pretrained(AutoModelForCausalLM, "model", name, dtype=dtype or "auto")
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, what: str = "tokenizer") -> Any:
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer, what, name)


def pretrained(kind: Any, what: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained`, quiet, and with one line for what goes wrong."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its retries would bury the one line of ours
    source = reasoner.path() if name == "reasoner" else name
    if source.startswith((".", "/")) and not Path(source).is_dir():
        raise ValueError(f"kvcomp: cannot load {what} {name!r}: no such folder")
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:  # messages of many lines, some very long
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 240)
        raise ValueError(f"kvcomp: cannot load {what} {name!r}: {reason}") from error


def encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not (chat and tokenizer.chat_template):
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


# --- trace ----------------------------------------------------------------------------------------


@app.command()
def trace(
    url: Annotated[str, typer.Option(help="Of the API, as in http://127.0.0.1:8000/v1.")],
    model: Annotated[str, typer.Option(help="Its name on the server.", metavar="NAME")],
    problems: Annotated[
        Path,
        typer.Option(help='JSONL: {"id", "prompt"}, or "messages" or "ids" for the prompt.'),
    ],
    log: Annotated[Path, typer.Option(help="JSONL of finished chunks; a run goes on from it.")],
    out: Annotated[Path | None, typer.Option(help="Write the traces, JSONL.")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens that the first chunk generates.")] = 8192,
    carry: Annotated[int, typer.Option(help="Tokens that the next chunk keeps.")] = 4096,
    head: Annotated[int, typer.Option(help="First tokens of the output that stay.")] = 100,
    max_chunks: Annotated[int, typer.Option(help="After which a trace ends.")] = 5,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or hub name; default: the model's.", metavar="NAME")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="ids; text; auto: ids where the server takes and returns them.")
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    top_p: float = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; default: none.")] = None,
    extra: Annotated[
        str | None, typer.Option(help="More fields of the request, in JSON.", metavar="OBJECT")
    ] = None,
    samples: Annotated[int, typer.Option(help="Traces of each problem.")] = 1,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds that a chunk may take.")] = 1800,
    retries: Annotated[
        int, typer.Option(help="Of a request, up to 8 s apart, while a server restarts.", min=0)
    ] = 40,
    progress: Annotated[bool, typer.Option(help="Show a bar on standard error.")] = True,
) -> None:
    """Delethink on an engine: chunks of thought from a completions endpoint, with a log.

    The API key is taken from OPENAI_API_KEY.
    """
    import openai

    from kvcomp import Delethink, delethink

    method = Delethink(chunk=chunk, carry=carry, head=head, max_chunks=max_chunks)
    fields = parse_extra(extra)
    sampling = delethink.Sampling(temperature=temperature, top_p=top_p, seed=seed, extra=fields)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"kvcomp: --url: expected http://... or https://..., got {url!r}")
    check_output(log)
    check_output(out)
    wanted = delethink.read_problems(problems)
    words = load_tokenizer(tokenizer or model)

    async def work() -> delethink.Run:
        key = os.environ.get("OPENAI_API_KEY") or "none"  # local engines ask for none
        async with openai.AsyncOpenAI(
            base_url=url, api_key=key, timeout=timeout, max_retries=retries
        ) as client:
            return await delethink.trace(
                client, wanted, method,
                model=model, log=log, tokenizer=words, tokens=tokens, sampling=sampling,
                samples=samples, concurrency=concurrency, progress=progress,
            )  # fmt: skip

    run = asyncio.run(work())
    if out is not None:
        rows = ({**dataclasses.asdict(t), "text": words.decode(t.output)} for t in run.traces)
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(run)


def parse_extra(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"kvcomp: --extra: expected a JSON object, got {text!r}")
    return fields
