"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvcomp.progress import stderr_console

Tell = Callable[[int, bool], None]  # new tokens, and whether a trace is complete


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Tell]:
    if not shown:
        yield lambda tokens, ended: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("traces"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task("", total=total, tokens=0)

        def tell(tokens: int, ended: bool) -> None:
            known = bar.tasks[0].fields["tokens"]
            bar.update(task, advance=int(ended), tokens=known + tokens)

        yield tell
