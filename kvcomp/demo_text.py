"""The demo on a real model: real text, read token by token under every method.

Compared is with dense attention on the same windows: what the model thinks of the next token,
step by step, and what each method holds and reads for it, counted by the run.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvcomp.info import cpu_model, versions
from kvcomp.methods import Method
from kvcomp.reading import Dense, read, scaled, windows

BUDGET_SHARE = 2  # the default budget is a window over this
PROMPT_SHARE = 4  # the prompt is a window over this
TEXT = "reference"
FIGURES: tuple[str, ...]
FIGURES = (
    "attended_ratio",
    "kv_bytes_peak",
    "kv_bytes_read_per_token",
    "tokens_per_second",
)
FIGURES += ("link_bytes_per_token",)


@dataclass(frozen=True)
class Settings:
    """What to read. A budget of None is half of a window."""

    model: str
    tokens: int = 512
    windows: int = 4
    budget: int | None = None
    device: str = "cpu"
    dtype: str | None = None


def run(
    names: list[str], settings: Settings, model: Any, tokenizer: Any, console: Console
) -> dict[str, Any]:
    """Read with each method of METHODS that is named; a progress bar goes to `console`.

    Returns:
        {"meta": {...}, "rows": [{"method", "nll", "d_nll", "top1", ...}]}, in the order of `names`.

    Raises:
        ValueError: a budget that a method cannot work with, or a text too short for the windows.
    """
    budget = settings.budget or settings.tokens // BUDGET_SHARE
    methods = [scaled(name, budget, settings.model) for name in names]
    chosen = windows(tokenizer, settings.windows, settings.tokens, texts=(TEXT,))
    prompt = settings.tokens // PROMPT_SHARE
    steps = settings.tokens - prompt - 1
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    rows = []
    with bar:
        total = bar.add_task("dense", total=len(methods) * steps)
        dense = Dense(model, chosen, prompt)
        for method in methods:
            bar.update(total, description=method.name)
            rows.append(_row(dense, method, lambda: bar.advance(total)))
    gpu = model.device.type == "cuda"
    meta = {
        "versions": versions(),
        "device_name": torch.cuda.get_device_name(model.device) if gpu else cpu_model(),
        "threads": torch.get_num_threads(),
        "text": TEXT,
        **asdict(settings),
        "dtype": str(model.dtype).removeprefix("torch."),
        "budget": budget,
        "prompt": prompt,
    }
    return {"meta": meta, "rows": rows}


def _row(dense: Dense, method: Method, tick: Any) -> dict[str, Any]:
    hidden, report = read(dense.model, method, dense.ids, dense.prompt, tick)
    (found,) = dense.compare([hidden], slice(None))
    figures = report.to_dict()
    return {
        "method": method.name,
        "parameters": str(method),
        "baseline": method.baseline,
        **{name: mean(window[name] for window in found) for name in found[0]},
        **{name: figures[name] for name in FIGURES},
    }


def headline(result: dict[str, Any]) -> str:
    """What was read, and on what."""
    meta = result["meta"]
    return (
        f"{meta['model']}: {meta['windows']} windows of {meta['tokens']} tokens of the Python"
        f" reference, {meta['prompt']} of them the prompt; budget {meta['budget']};"
        f" {meta['dtype']} on {meta['device_name']}"
    )


def table(result: dict[str, Any]) -> Table:
    """A row per method: loss of the next token, beside dense, and equal best tokens, ..."""
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    out.add_column("method")
    headings = (
        "loss",
        "to dense",
        "same token",
        "attended",
        "KV peak",
        "KV read/token",
        "tokens/s",
    )
    for heading in headings:
        out.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        out.add_row(
            row["method"],
            f"{row['nll']:.3f}",
            f"{row['d_nll']:+.3f}",
            f"{row['top1']:.1%}",
            f"{row['attended_ratio']:.0%}",
            f"{row['kv_bytes_peak'] / 2**20:.1f} MiB",
            f"{row['kv_bytes_read_per_token'] / 2**20:.2f} MiB",
            f"{row['tokens_per_second']:.0f}",
        )
    return out


def plot(result: dict[str, Any]) -> bytes:
    """A PNG with two bars a method: loss above dense, and bytes of K and V at their peak."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    rows = result["rows"][::-1]
    dense = max(row["kv_bytes_peak"] for row in rows)
    figure = Figure(figsize=(7.2, 1.1 + 0.42 * len(rows)), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, form, title in (
        (left, [row["d_nll"] for row in rows], "{:+.3f}", "loss above dense, nats a token"),
        (right, [row["kv_bytes_peak"] / dense for row in rows], "{:.0%}", "peak bytes of K and V"),
    ):
        colours = ["#9aa5b1" if row["baseline"] else "#2563eb" for row in rows]
        bars = axes.barh([row["method"] for row in rows], values, color=colours, height=0.62)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(min(0, *values), 1.25 * max(*values, 1e-9))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelbottom=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
