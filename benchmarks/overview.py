"""One picture of what the methods save: the time of a token, memory, and what it costs in accuracy.

Drawn by `reproduce.py --plots`, from some of the stored results.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawing import COLORS, by, legend, plt
from language import charts as language

METHODS = ("delethink", "delta", "lazy-eviction", "louis-kv")  # coloured as in the study's charts
LINES = {**dict(zip(METHODS, COLORS, strict=False)), "full": "#666666", "hf dynamic": "#111111"}
NAMES = {"full": "full: dense attention", "hf dynamic": "transformers, its default cache"}


def overview(stored: Path) -> Figure:
    figure, (time, memory, accuracy) = plt.subplots(1, 3, figsize=(12, 3.8))
    figure.set_layout_engine("constrained")
    study = _rows(stored / "accuracy" / "study.json")
    _time(time, _rows(stored / "decode" / "steps.json"))
    _memory(memory, study)
    loss = [
        row for file in sorted((stored / "language").glob("loss-*.json")) for row in _rows(file)
    ]
    accuracy.set_title("nats per token above dense attention (SmolLM2)", loc="left")
    language.over_bytes(accuracy, loss, LINES)
    legend(figure)
    return figure


def _time(axis: Axes, rows: list[dict]) -> None:
    axis.set_title("ms per token (shape of Qwen3-0.6B)", loc="left")
    for name, points in by(rows, "name").items():
        if name in LINES:
            x, y = [r["tokens"] for r in points], [r["ms"] for r in points]
            axis.plot(x, y, "-o", ms=4, lw=2, color=LINES[name], label=NAMES.get(name, name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(x, [f"{tokens // 1024}K" for tokens in x])
    ticks = (50, 100, 200, 500, 1000, 2000)
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set_xlabel("tokens of context")


def _memory(axis: Axes, rows: list[dict]) -> None:
    axis.set_title("MiB of K and V on the device (the reasoner)", loc="left")
    traced = [r for r in rows if r["method"] in LINES and not r["reason"] and r["trace"]]
    bounds = sorted({(r["bound_bytes"], r["bound"]) for r in traced if r["bound_bytes"]})
    middle = bounds[len(bounds) // 2][1]
    for row in traced:
        if row["method"] == "full" or row["bound"] == middle:
            tokens, held = zip(*row["trace"], strict=True)
            style = "--" if row["method"] == "delta" else "-"  # it lies upon full
            axis.plot(tokens, [b / 2**20 for b in held], style, lw=2, color=LINES[row["method"]])
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"tokens decoded; bound: {middle} of all")


def _rows(file: Path) -> list[dict]:
    return json.loads(file.read_text())["rows"]
