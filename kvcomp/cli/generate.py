"""kvcomp generate."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Annotated, Any

import typer

from kvcomp import Method
from kvcomp.cli.common import Device, Dtype, load, pick_device, pick_dtype, pick_method


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A causal LM: a folder, a GGUF file, a hub name, what `kvcomp get` fetched, or"
            " 'reasoner', the bundled one."
        ),
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
        bool | None,
        typer.Option(help="Prompt through the chat template; default: where there is one."),
    ] = None,
) -> None:
    """Stream text from a model under a method.

    The report goes to standard error.
    """
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


def encode(tokenizer: Any, text: str, chat: bool | None) -> Any:
    """The prompt's tokens, as one message of the user where `chat` or the tokenizer says so."""
    if chat and not tokenizer.chat_template:
        raise ValueError("kvcomp: --chat: the model's tokenizer has no chat template: --no-chat")
    if chat is False or not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
