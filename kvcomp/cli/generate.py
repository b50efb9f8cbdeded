"""kvcomp generate."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomp import Method
from kvcomp.cli.common import (
    Carry,
    Chunk,
    Device,
    Dtype,
    Inner,
    Kv,
    Set,
    chunk_options,
    load,
    pick_device,
    pick_dtype,
    pick_kv,
    pick_method,
)
from kvcomp.cli.output import deliver, say, say_aside
from kvcomp.cli.stopping import Stopped, exit_code

if TYPE_CHECKING:
    from kvcomp.thinking import Chosen


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="Causal LM: a folder, a GGUF file, a hub name, or a short name ('reasoner', or one"
            " that `kvcomp get` has fetched)."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Prompt text, or - to read standard input.")],
    method: Annotated[
        str,
        typer.Option(
            help="Method name: full, delta, louis-kv, lazy-eviction, delethink or a baseline.",
            metavar="NAME",
        ),
    ] = "delta",
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens a layer keeps or attends to; default: the method's own."),
    ] = None,
    chunk: Chunk = None,
    carry: Carry = None,
    inner: Inner = None,
    settings: Set = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens to generate.", min=1)
    ] = 4096,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Sampling seed.", min=0, max=2**32 - 1)] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature, 0 for greedy; default: the model's own.", min=0.0),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most likely tokens that have this share of the probability;"
            " default: the model's own.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Use the tokenizer's chat template; default: if it has one."),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="Strategy that acts while decoding: cgrs, concise-hint, stop-scale,"
            " budget-forcing or stand; repeat for several.",
            metavar="NAME",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--with", help="Set an option of a strategy.", metavar="NAME.OPTION=VALUE"),
    ] = None,
    kv: Kv = "model",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the decode step, over a cache with room for the prompt and"
            " --max-new-tokens. Takes a minute the first time and pays for long outputs.",
        ),
    ] = False,
) -> None:
    """Generate text with a method and stream it.

    The report goes to standard error. Ctrl-C ends the answer and prints the report.
    """
    chosen_method = build_method(
        method, model, budget, settings or [], chunk_options(chunk, carry), inner
    )
    sampling = pick_sampling(temperature, top_p)
    where, kind, kept = pick_device(device), pick_dtype(dtype), pick_kv(kv)
    text = read_prompt(prompt)

    from kvcomp.hf import patch
    from kvcomp.hf.compiled import for_generate
    from kvcomp.thinking import GumbelNoise, Stand

    chosen = choose(strategy or [], options or [], while_decoding=True)
    network, tokenizer = load(model, where, kind)
    inputs = encode(tokenizer, text, chat).to(where)
    room = None
    if compiled:
        room = inputs["input_ids"].shape[1] + max_new_tokens
        sampling["compile_config"] = for_generate()
    streamer = text_streamer(tokenizer)
    code = 0
    with patch(network, chosen_method, max_tokens=room, kv=kept) as run:
        more = chosen.generation(run, tokenizer, inputs["input_ids"].shape[1])
        # A sampled answer is a function of the seed, with and without speculation.
        more["logits_processor"] = [*more.get("logits_processor", []), GumbelNoise(seed)]
        if isinstance(stand := more.get("custom_generate"), Stand):
            stand.streamer = streamer  # which `generate` keeps from it

        def answer() -> None:
            nonlocal code
            try:
                network.generate(
                    **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling, **more
                )
            except (KeyboardInterrupt, Stopped) as stop:
                code = exit_code(stop)
                streamer.end()  # what it holds back until a word is whole

        deliver(answer, lambda: say_aside(run.report()))
    raise typer.Exit(code)


def choose(names: list[str], settings: list[str], *, while_decoding: bool = False) -> Chosen:
    """The strategies of the options --strategy and --with.

    Raises:
        ValueError: an unknown one, one that is not for this command, or a bad option.
    """
    from kvcomp.thinking.strategies import STRATEGIES, WHILE_DECODING, Chosen

    known = WHILE_DECODING if while_decoding else list(STRATEGIES)
    for name in names:
        if name not in known:
            wanted = f"expected one of {', '.join(known)}"
            hint = "; use kvcomp think" if name in STRATEGIES else ""
            raise ValueError(f"kvcomp: --strategy: {wanted}, got {name!r}{hint}")
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, _, rest = setting.partition(".")
        option, _, text = rest.partition("=")
        if name not in names:
            raise ValueError(f"kvcomp: --with: expected NAME.OPTION=VALUE, got {setting!r}")
        kinds = STRATEGIES[name].options
        if option not in kinds:
            has = ", ".join(kinds)
            raise ValueError(f"kvcomp: --with: {name!r} has no option {option!r}; it has: {has}")
        value = parse(setting, kinds[option], text, "--with")
        options.setdefault(name, {})[option] = value
    return Chosen(names, options)


def read_prompt(prompt: str) -> str:
    """The text of --prompt, from standard input if it is "-".

    Raises:
        ValueError: there is none, it cannot be read, or it is no valid Unicode.
    """
    if prompt == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise ValueError("kvcomp: --prompt: standard input is closed")
        try:
            prompt = sys.stdin.read()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"kvcomp: --prompt: cannot read standard input: {error}") from error
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of an argument that are no UTF-8
        raise ValueError("kvcomp: --prompt: expected UTF-8 text, got other bytes") from error
    if not prompt.strip():
        raise ValueError("kvcomp: --prompt: expected some text, got none")
    return prompt


def text_streamer(tokenizer: Any) -> Any:
    """A TextStreamer of new text only, which says where standard output refuses it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, end="\n" if stream_end else "")

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def build_method(
    name: str,
    model: str,
    budget: int | None,
    settings: list[str],
    chunks: dict[str, int | None],
    inner: str | None,
) -> Method:
    """The method `name` with its published settings for the model and the options given."""
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


def parse(setting: str, hint: Any, text: str, option: str = "--set") -> Any:
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
        f"kvcomp: {option} {setting}: expected a value of type {getattr(hint, '__name__', hint)}"
    )


def pick_sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Keyword arguments of `generate`; none if no option is given, so the model's defaults hold."""
    for option, value in (("temperature", temperature), ("top-p", top_p)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"kvcomp: --{option}: expected a number, got {value}")
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    asked = {"temperature": temperature, "top_p": top_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    return asked | {"do_sample": True} if asked else {}


def encode(tokenizer: Any, text: str, chat: bool | None) -> Any:
    """Token ids of the prompt, as a user message if the tokenizer has a chat template."""
    if chat and not tokenizer.chat_template:
        raise ValueError("kvcomp: --chat: expected a tokenizer with a chat template: use --no-chat")
    if chat is False or not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
