"""kvcomp think."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomp.cli.common import Device, Dtype, Kv, load, pick_device, pick_dtype, pick_kv
from kvcomp.cli.output import check_distinct, check_output, deliver, say, say_aside, write
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
from kvcomp.cli.stopping import Stopped

if TYPE_CHECKING:
    from kvcomp.thinking import Result


def think(
    problems: Annotated[
        Path,
        typer.Argument(
            help='JSONL file of problems: {"id": ..., "prompt": ...}, or "messages" or "ids" in'
            ' place of the prompt; "answer", if it is known.'
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Causal LM: a folder, hub name or short name.", metavar="NAME")
    ],
    log: Annotated[
        Path, typer.Option(help="JSONL log of finished problems; the same command resumes from it.")
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="cgrs, concise-hint, stop-scale, budget-forcing, and one of majority, short-m,"
            " latent-trajectory, pdr, sr, dser, stand; repeat for several.",
            metavar="NAME",
        ),
    ] = None,
    options: With = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSONL file.")] = None,
    method: Annotated[str, typer.Option(help="Method name.", metavar="NAME")] = "full",
    budget: Budget = None,
    chunk: Chunk = None,
    carry: Carry = None,
    inner: Inner = None,
    settings: Set = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a row.")] = 8192,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 for greedy.")] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most likely tokens that have this share of the probability."
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    kv: Kv = "model",
    progress: Annotated[bool, typer.Option(help="Show a progress bar on standard error.")] = True,
) -> None:
    """Answer a file of problems by strategies of long reasoning, with a log to resume from.

    The summary goes to standard output, the report of the method to standard error.
    """
    chunks = chunk_options(chunk, carry)
    chosen_method = build_method(method, model, budget, settings or [], chunks, inner)
    where, kind, kept = pick_device(device), pick_dtype(dtype), pick_kv(kv)
    check_distinct(problems=problems, log=log, out=out)
    check_output(log)
    check_output(out)

    from kvcomp import thinking
    from kvcomp.hf import patch
    from kvcomp.problems import read_problems

    chosen = choose(strategy or [], options or [])
    drawn = thinking.Sampling(
        temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens
    )
    wanted = read_problems(problems)
    for number, each in enumerate(wanted):
        if not isinstance(each.get("answer"), str | int | float | None):
            raise ValueError(
                f"kvcomp: problem number {number}: answer: expected text or a number, got"
                f" {each['answer']!r}"
            )
    network, tokenizer = load(model, where, kind)
    with patch(network, chosen_method, kv=kept) as run:
        try:
            found = thinking.think(
                run, tokenizer, wanted, chosen,
                log=log, settings={"model": model}, progress=progress, **dataclasses.asdict(drawn),
            )  # fmt: skip
        except (KeyboardInterrupt, Stopped):
            say_aside(
                f"kvcomp: stopped; finished problems are in {log}: repeat the command to resume"
            )
            raise
        report = run.report()
    golds = {str(each["id"]): each.get("answer") for each in wanted}
    lines = [json.dumps({"id": name} | dataclasses.asdict(each)) for name, each in found.items()]
    deliver(
        lambda: say(summary(found, golds)),
        lambda: say_aside(report),
        lambda: write(out, "".join(line + "\n" for line in lines)),
    )


def summary(found: dict[str, Result], golds: dict[str, Any]) -> str:
    """One line: problems, right answers where they are known, tokens."""
    from kvcomp.comparison import plural

    graded = [name for name in found if golds[name] is not None]
    right = sum(found[name].answer == str(golds[name]).strip() for name in graded)
    parts = [plural(len(found), "problem")]
    if graded:
        parts.append(f"{right} of {len(graded)} right")
    total, path = (
        sum(getattr(each, name) for each in found.values())
        for name in ("total_tokens", "sequential_tokens")
    )
    parts.append(f"{total:,} tokens in all, {path:,} one after another")
    return ", ".join(parts)
