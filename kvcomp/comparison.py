"""Parts that both demos share: progress bar, table and chart of a comparison of methods."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvcomp.info import cpu_model, versions
from kvcomp.progress import passing_bar

if TYPE_CHECKING:
    from rich.console import Console

METHOD, BASELINE = "#2563eb", "#9aa5b1"


def plural(count: int, what: str) -> str:
    """A count and its noun."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def steps_bar(console: Console) -> Progress:
    """A progress bar that counts steps and disappears at the end."""
    return passing_bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
    )


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, device name and number of threads, for the `meta` of a result."""
    gpu = device.type == "cuda"
    return {
        "versions": versions(),
        "device_name": torch.cuda.get_device_name(device) if gpu else cpu_model(),
        "threads": torch.get_num_threads(),
    }


def dtypes(meta: dict[str, Any]) -> str:
    """The data type of a result's model, and of its K and V where they have another."""
    return meta["dtype"] + (", K and V in eight bits," if meta["kv"] == "int8" else "")


def methods_table(headings: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table with the method's name first; each row has the name and a text per heading."""
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    out.add_column("method")
    for heading in headings:
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return out


class Bars(NamedTuple):
    """One half of a chart: a bar per method, with labels in the given format."""

    title: str
    values: list[float]
    label: str
    limits: tuple[float, float]  # of the axis, with room for the labels


def chart(rows: list[dict[str, Any]], left: Bars, right: Bars, title: str | None = None) -> bytes:
    """A PNG with two bars per method, for rows with the fields "method" and "baseline"."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    names = [row["method"] for row in rows]
    colours = [BASELINE if row["baseline"] else METHOD for row in rows]
    figure = Figure(figsize=(7.2, 1.1 + 0.42 * len(rows)), layout="constrained", dpi=150)
    for axes, half in zip(figure.subplots(1, 2, sharey=True), (left, right), strict=True):
        bars = axes.barh(names, half.values, color=colours, height=0.62)
        labels = [half.label.format(value) for value in half.values]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set_title(half.title, loc="left", fontsize=10)
        axes.set_xlim(*half.limits)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelbottom=False)
    axes.invert_yaxis()  # the first row on top
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, color="#52606d")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
