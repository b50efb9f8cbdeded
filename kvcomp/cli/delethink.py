"""kvcomp delethink."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.checks import require
from kvcomp.cli.common import load_tokenizer
from kvcomp.cli.output import check_distinct, check_output, deliver, say, say_aside, write
from kvcomp.cli.stopping import Stopped, run_async


def delethink(
    url: Annotated[str, typer.Option(help="API base URL, e.g. http://127.0.0.1:8000/v1.")],
    model: Annotated[str, typer.Option(help="Model name on the server.", metavar="NAME")],
    problems: Annotated[
        Path,
        typer.Option(
            help='JSONL file of problems: {"id": ..., "prompt": ...}, or "messages" or "ids" in'
            " place of the prompt."
        ),
    ],
    log: Annotated[
        Path, typer.Option(help="JSONL log of finished chunks; the same command resumes from it.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the traces to this JSONL file.")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens that the first chunk generates.")] = 8192,
    carry: Annotated[int, typer.Option(help="Output tokens carried into the next chunk.")] = 4096,
    head: Annotated[
        int, typer.Option(help="First tokens of the output, which every chunk keeps.")
    ] = 100,
    max_chunks: Annotated[int, typer.Option(help="Maximum number of chunks per trace.")] = 5,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of the tokenizer; default: the tokenizer of --model.",
            metavar="NAME",
        ),
    ] = None,
    tokens: Annotated[
        str,
        typer.Option(
            help="Send and receive token ids or text; auto: ids if the server supports them.",
            metavar="ids|text|auto",
        ),
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 for greedy.")] = 0.6,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most likely tokens that have this share of the probability."
        ),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Sampling seed; default: none.")] = None,
    extra: Annotated[
        str | None,
        typer.Option(
            help='More request fields as a JSON object, e.g. {"min_p": 0.1}.', metavar="OBJECT"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Traces per problem.")] = 1,
    concurrency: Annotated[int, typer.Option(help="Maximum number of requests in flight.")] = 32,
    timeout: Annotated[float, typer.Option(help="Time limit for a chunk, in seconds.")] = 1800,
    retries: Annotated[
        int,
        typer.Option(
            help="Retries per request (at most 8 s apart) while a server restarts.", min=0
        ),
    ] = 40,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on standard error.")] = True,
) -> None:
    """Run Delethink on a server, with a log to resume from.

    The server needs an OpenAI-compatible completions endpoint (vLLM, SGLang, transformers serve).
    The API key is read from OPENAI_API_KEY.
    """
    import openai

    from kvcomp import Delethink
    from kvcomp import delethink as server

    method = Delethink(chunk=chunk, carry=carry, head=head, max_chunks=max_chunks)
    fields = parse_extra(extra)
    sampling = server.Sampling(temperature=temperature, top_p=top_p, seed=seed, extra=fields)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"kvcomp: --url: expected http://... or https://..., got {url!r}")
    require(timeout > 0, "kvcomp: --timeout", "seconds above 0", timeout)
    check_distinct(problems=problems, log=log, out=out)
    check_output(log)
    check_output(out)
    wanted = server.read_problems(problems)
    words = load_tokenizer(tokenizer or model)

    async def work() -> server.Run:
        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers ask for none
        async with openai.AsyncOpenAI(
            base_url=url, api_key=key, timeout=timeout, max_retries=retries
        ) as client:
            return await server.trace(
                client, wanted, method,
                model=model, log=log, tokenizer=words, tokens=tokens, sampling=sampling,
                samples=samples, concurrency=concurrency, progress=progress,
            )  # fmt: skip

    try:
        run = run_async(work())
    except (KeyboardInterrupt, Stopped):
        say_aside(f"kvcomp: stopped; finished chunks are in {log}: repeat the command to resume")
        raise
    rows = ({**dataclasses.asdict(t), "text": words.decode(t.output)} for t in run.traces)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    deliver(lambda: say(run), lambda: write(out, lines))


def parse_extra(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"kvcomp: --extra: expected a JSON object, got {text!r}")
    return fields
