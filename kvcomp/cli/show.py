"""kvcomp info | demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp import METHODS
from kvcomp.cli.common import Device, Dtype, Kv, load, pick_device, pick_dtype, pick_kv
from kvcomp.cli.output import check_distinct, check_output, deliver, say, say_aside, show, write
from kvcomp.cli.settings import pick_method
from kvcomp.cli.stopping import Stopped, exit_code
from kvcomp.progress import stderr_console
from kvcomp.reasoner import task


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    with_selftest: Annotated[
        bool,
        typer.Option("--selftest", help="Check every kernel; exit code 1 if one is wrong."),
    ] = False,
) -> None:
    """Show versions, devices and the implementations of each op."""
    from kvcomp.info import gather, tables

    found = gather()
    if with_selftest:
        from kvcomp import selftest

        found["selftest"] = selftest.run()
    if as_json:
        say(json.dumps(found, indent=2))
    else:
        for table in tables(found):
            show(table, "")
        if with_selftest:
            show(selftest.table(found["selftest"]))
            for line in selftest.complaints(found["selftest"]):
                say(line)
    if with_selftest and not selftest.is_right(found["selftest"]):
        raise typer.Exit(1)


def demo(
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method name; repeat for several, or 'all'. Default: all methods except"
            " baselines, plus dense attention and two random ones.",
            metavar="NAME",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens per layer; default: half of the final context.", min=1),
    ] = None,
    problems: Annotated[int, typer.Option(help="Problems, decoded as one batch.", min=1)] = 8,
    nodes: Annotated[
        int, typer.Option(help="Problem size in nodes, two facts each.", min=2, max=len(task.NAMES))
    ] = 16,
    steps: Annotated[int, typer.Option(help="Reasoning steps of 4 tokens each.", min=1)] = 256,
    model: Annotated[
        str,
        typer.Option(
            help="Another model reads real text instead of solving problems.",
            metavar="NAME",
        ),
    ] = "reasoner",
    windows: Annotated[
        int, typer.Option(help="With --model: windows of text, read as one batch.", min=1)
    ] = 4,
    tokens: Annotated[
        int, typer.Option(help="With --model: tokens per window; a quarter is the prompt.", min=16)
    ] = 512,
    device: Device = None,
    dtype: Dtype = None,
    kv: Kv = "model",
    seed: Annotated[int, typer.Option(help="Seed of the problems.", min=0)] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the results as JSON.", metavar="FILE"),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the results as PNG.", metavar="FILE")
    ] = None,
) -> None:
    """Compare methods on problems, or on real text with --model.

    The problems are for the bundled reasoning model, whose every step is graded. With another
    model, the table has its loss on real text. Ctrl-C shows the methods that are done.
    """
    names = list(dict.fromkeys(method)) if method else main_methods()
    if names == ["all"]:
        names = all_methods()
    for name in names:
        pick_method(name)
    check_distinct(json=json_file, plot=plot_file)
    for file in (json_file, plot_file):
        check_output(file)
    where, kind, kept = pick_device(device), pick_dtype(dtype), pick_kv(kv)
    if plot_file is not None:
        import matplotlib  # noqa: F401  (better missed now than after the work)
    work: Any
    if model == "reasoner":
        from kvcomp import demo as work

        settings = work.Settings(problems, nodes, steps, seed, budget, where, kind, kept)
        results = work.run(names, settings, stderr_console())
    else:
        from kvcomp import demo_text as work

        names = [name for name in names if name != "delethink"]  # a text is given: no new contexts
        settings = work.Settings(model, tokens, windows, budget, where, kind, kept)
        results = work.run(names, settings, *load(model, where, kind), stderr_console())
    result, code = None, 0
    try:
        for result in results:  # noqa: B007  (the last one is kept)
            pass
    except (KeyboardInterrupt, Stopped) as stop:
        code = exit_code(stop)
        done = len(result["rows"]) if result else 0
        say_aside(f"kvcomp: stopped with {done} of {len(names)} methods done")
    if result is None:
        raise typer.Exit(code)
    picture = work.plot(result) if plot_file is not None else b""
    deliver(
        lambda: show(work.headline(result), work.table(result)),
        lambda: write(json_file, json.dumps(result, indent=2) + "\n"),
        lambda: write(plot_file, picture),
    )
    raise typer.Exit(code)


def all_methods() -> list[str]:
    """Dense attention first, then the methods, then the other baselines."""
    return sorted(METHODS, key=lambda name: (name != "full", METHODS[name].baseline))


def main_methods() -> list[str]:
    """Dense attention, all methods except baselines, and the two random baselines."""
    shown = ("full", "random-pages", "random-eviction")
    return [name for name in all_methods() if name in shown or not METHODS[name].baseline]
