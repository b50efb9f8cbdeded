"""kvcomp trace."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.common import check_output, load_tokenizer


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
    """Delethink on an engine: chunks of thought, with a log.

    The engine has an OpenAI-compatible completions endpoint. The API key is taken from
    OPENAI_API_KEY.
    """
    import openai

    from kvcomp import Delethink, delethink

    method = Delethink(chunk=chunk, carry=carry, head=head, max_chunks=max_chunks)
    fields = parse_extra(extra)
    sampling = delethink.Sampling(temperature=temperature, top_p=top_p, seed=seed, extra=fields)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"kvcomp: --url: expected http://... or https://..., got {url!r}")
    if not timeout > 0:
        raise ValueError(f"kvcomp: --timeout: expected seconds above 0, got {timeout:g}")
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
