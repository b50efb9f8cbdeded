"""The demo on a real model: every method reads real text token by token.

Each method is compared with dense attention on the same windows: the loss of the next token at
every step, and the tokens and bytes that the run counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from kvcomp.comparison import Bars, chart, dtypes, machine, methods_table, plural, steps_bar
from kvcomp.methods import Method
from kvcomp.reading import Dense, read, scaled, windows

BUDGET_SHARE = 2  # the default budget is a window over this
PROMPT_SHARE = 4  # the prompt is a window over this
TEXT = "reference"
FIGURES = (
    "attended_ratio",
    "kv_bytes_peak",
    "kv_bytes_read_per_token",
    "tokens_per_second",
    "link_bytes_per_token",
)


@dataclass(frozen=True)
class Settings:
    """What to read. A budget of None is half of a window."""

    model: str
    tokens: int = 512
    windows: int = 4
    budget: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    kv: str = "model"


def run(
    names: list[str], settings: Settings, model: Any, tokenizer: Any, console: Console
) -> Iterator[dict[str, Any]]:
    """Read with each method of METHODS that is named; a progress bar goes to `console`.

    Yields:
        after each method, the result so far: {"meta": {...}, "rows": [{"method", "nll", "d_nll",
        "top1", ...}]}, in the order of `names`.

    Raises:
        ValueError: a budget that a method cannot work with, or a text too short for the windows.
    """
    budget = settings.budget or settings.tokens // BUDGET_SHARE
    methods = [scaled(name, budget, settings.model) for name in names]
    chosen = windows(tokenizer, settings.windows, settings.tokens, texts=(TEXT,))
    prompt = settings.tokens // PROMPT_SHARE
    steps = settings.tokens - prompt - 1
    meta = {
        **machine(model.device),
        "text": TEXT,
        **asdict(settings),
        "dtype": str(model.dtype).removeprefix("torch."),
        "budget": budget,
        "prompt": prompt,
    }
    bar = steps_bar(console)
    rows: list[dict[str, Any]] = []
    with bar:
        total = bar.add_task("dense", total=len(methods) * steps)
        dense = Dense(model, chosen, prompt)
        for method in methods:
            bar.update(total, description=method.name)
            rows.append(_row(dense, method, settings.kv, lambda: bar.advance(total)))
            yield {"meta": meta, "rows": rows}


def _row(dense: Dense, method: Method, kv: str, tick: Any) -> dict[str, Any]:
    hidden, report = read(dense.model, method, dense.ids, dense.prompt, tick, kv=kv)
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
    """Model, text, budget, data types and device, in one line."""
    meta = result["meta"]
    return (
        f"{meta['model']}: {plural(meta['windows'], 'window')} of {meta['tokens']} tokens of the"
        f" Python reference, {meta['prompt']} of them the prompt; budget {meta['budget']};"
        f" {dtypes(meta)} on {meta['device_name']}"
    )


def table(result: dict[str, Any]) -> Table:
    """One row per method: loss of the next token, its difference to dense attention, the share of
    equal best tokens, tokens, bytes, rate."""
    return methods_table(
        ("loss", "to dense", "same token", "attended", "KV peak", "KV read/token", "tokens/s"),
        (
            (
                row["method"],
                f"{row['nll']:.3f}",
                f"{row['d_nll']:+.3f}",
                f"{row['top1']:.1%}",
                f"{row['attended_ratio']:.0%}",
                f"{row['kv_bytes_peak'] / 2**20:.1f} MiB",
                f"{row['kv_bytes_read_per_token'] / 2**20:.2f} MiB",
                f"{row['tokens_per_second']:.0f}",
            )
            for row in result["rows"]
        ),
    )


def plot(result: dict[str, Any]) -> bytes:
    """A PNG with two bars per method: loss above dense attention, and peak bytes of K and V."""
    rows = result["rows"]
    dense = max(row["kv_bytes_peak"] for row in rows)
    loss = [row["d_nll"] for row in rows]
    peak = [row["kv_bytes_peak"] / dense for row in rows]
    return chart(
        rows,
        Bars("loss above dense, nats per token", loss, "{:+.3f}", _limits(loss)),
        Bars("peak bytes of K and V", peak, "{:.0%}", _limits(peak)),
    )


def _limits(values: list[float]) -> tuple[float, float]:
    return min(0, *values), 1.25 * max(*values, 1e-9)
