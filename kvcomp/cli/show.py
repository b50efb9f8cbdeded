"""kvcomp info | demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomp import METHODS
from kvcomp.cli.common import (
    Device,
    Dtype,
    check_output,
    output_console,
    pick_device,
    pick_dtype,
    pick_method,
)
from kvcomp.reasoner import task


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    with_selftest: Annotated[
        bool,
        typer.Option("--selftest", help="Check every kernel here; exit code 1 if any is wrong."),
    ] = False,
) -> None:
    """Versions, devices, and what of each op runs where."""
    from kvcomp.info import gather, tables

    found = gather()
    if with_selftest:
        from kvcomp import selftest

        found["selftest"] = selftest.run()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console = output_console()
        for table in tables(found):
            console.print(table)
            console.print()
        if with_selftest:
            console.print(selftest.table(found["selftest"]))
            for line in selftest.complaints(found["selftest"]):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    if with_selftest and not selftest.is_right(found["selftest"]):
        raise typer.Exit(1)


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
    """Compare methods on problems of the bundled reasoner."""
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


def all_methods() -> list[str]:
    """Dense attention first, then the methods, then the other baselines."""
    return sorted(METHODS, key=lambda name: (name != "full", METHODS[name].baseline))


def main_methods() -> list[str]:
    """The methods, between dense attention and what is drawn at random."""
    shown = ("full", "random-pages", "random-eviction")
    return [name for name in all_methods() if name in shown or not METHODS[name].baseline]
