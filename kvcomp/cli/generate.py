"""kvcomp generate."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import typer

from kvcomp.cli.common import Device, Dtype, Kv, load, pick_device, pick_dtype, pick_kv
from kvcomp.cli.output import deliver, say, say_aside
from kvcomp.cli.settings import (
    Budget,
    Carry,
    Chunk,
    Inner,
    Set,
    With,
    build_method,
    choose,
    chunk_options,
)
from kvcomp.cli.stopping import Stopped, exit_code

# One row of ids, whatever the generation config of a model asks for.
ONE: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), 1),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), False),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), False),
}


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
    budget: Budget = None,
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
    options: With = None,
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
    from kvcomp.hf.positions import fitting
    from kvcomp.thinking import STRATEGIES, GumbelNoise, Stand

    chosen = choose(strategy or [], options or [], while_decoding=True)
    if compiled and (growing := [name for name in chosen.names if STRATEGIES[name].grows]):
        raise ValueError(
            f"kvcomp: --compile: expected no {' and no '.join(growing)}, whose cache must grow,"
            " got --compile"
        )
    network, tokenizer = load(model, where, kind)
    inputs = encode(tokenizer, text, chat).to(where)
    beams = network.generation_config.num_beams or 1
    if beams > 1:
        say_aside(f"kvcomp: the model's own num_beams={beams} is not used: one answer is streamed")
    columns = inputs["input_ids"].shape[1]
    most = fitting(network.config, chosen_method, columns, max_new_tokens, "kvcomp: --prompt")
    room = None
    if compiled:
        room = columns + most
        sampling["compile_config"] = for_generate()
    streamer = text_streamer(tokenizer)
    code = 0
    with patch(network, chosen_method, max_tokens=room, kv=kept) as run:
        more = chosen.generation(run, tokenizer, columns)
        # A sampled answer is a function of the seed, with and without speculation.
        more["logits_processor"] = [*more.get("logits_processor", []), GumbelNoise(seed)]
        if isinstance(stand := more.get("custom_generate"), Stand):
            stand.streamer = streamer  # which `generate` keeps from it

        def answer() -> None:
            nonlocal code
            try:
                out = network.generate(
                    **inputs, max_new_tokens=most, streamer=streamer, **ONE, **sampling, **more
                )
                if most < max_new_tokens and out.shape[1] == columns + most:
                    say_aside(
                        f"kvcomp: the answer ends at the model's last position, {columns + most}"
                    )
            except (KeyboardInterrupt, Stopped) as stop:
                code = exit_code(stop)
                streamer.end()  # what it holds back until a word is whole

        deliver(answer, lambda: say_aside(run.report()))
    raise typer.Exit(code)


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
