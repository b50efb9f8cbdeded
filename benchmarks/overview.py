"""One picture of what the methods save: the time of a token, memory, and what it costs in accuracy.

Drawn by `reproduce.py --plots`, from three of the stored results.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accuracy.summary import summarize
from drawing import COLORS, by, legend, plt

OURS = dict(
    zip(("delta", "lazy-eviction", "louis-kv", "delethink"), COLORS, strict=False), full="#555555"
)
STOCK = "#111111"
NAMES = {"hf dynamic": "transformers, default cache", "full": "full: dense attention, our kernels"}


def overview(stored: Path) -> Figure:
    figure, (time, memory, accuracy) = plt.subplots(1, 3, figsize=(11, 3.7))
    figure.set_layout_engine("constrained")
    _time(time, _rows(stored / "decode.json"))
    _memory(memory, _rows(stored / "long-run.json"))
    _accuracy(accuracy, _rows(stored / "accuracy-study.json"))
    legend(figure)
    return figure


def _time(axis: Axes, rows: list[dict]) -> None:
    axis.set_title("Time: ms per token, the shape of Qwen3-0.6B", loc="left")
    for name, points in by(rows, "name").items():
        if name in OURS or name == "hf dynamic":
            x, y = [r["tokens"] for r in points], [r["ms"] for r in points]
            axis.plot(x, y, "-o", ms=4, lw=2, color=OURS.get(name, STOCK), label=NAMES.get(name, name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([r["tokens"] for r in points], [f"{r['tokens'] // 1024}K" for r in points])
    axis.set_yticks([200, 500, 1000, 2000, 5000], ["200", "500", "1000", "2000", "5000"])
    axis.minorticks_off()
    axis.set_xlabel("tokens of context")


def _memory(axis: Axes, rows: list[dict]) -> None:
    axis.set_title("Memory: MB of K and V on the device", loc="left")
    for name, points in by(rows, "method").items():
        x, y = [r["tokens"] / 1000 for r in points], [r["held"] / 1e6 for r in points]
        axis.plot(x, y, lw=2, ls="--" if name == "delta" else "-", color=OURS[name])
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("thousands of tokens decoded by the reasoner")


def _accuracy(axis: Axes, rows: list[dict]) -> None:
    axis.set_title("Accuracy: steps of the reasoner that are right, %", loc="left")
    lines: dict[str, list] = {}
    for summary in summarize(rows):
        if summary.reason is None and not (summary.keeps_all and summary.baseline):
            lines.setdefault(summary.method, []).append(summary)
    whole = max(s.peak_bytes for points in lines.values() for s in points)
    grey = "baselines: windows, random, H2O, R-KV, TOVA, SnapKV, ..."
    for name, points in lines.items():
        points = sorted(points, key=lambda s: s.attended)
        x, y = [100 * s.attended for s in points], [100 * s.score.mean for s in points]
        if name in OURS:
            axis.plot(x, y, "-o", ms=5, lw=2, color=OURS[name], zorder=3)
        else:
            axis.plot(x, y, "-", lw=0.9, color="#BBBBBB", label=grey)
            grey = None
    assert whole
    axis.set_xlabel("tokens attended, % of dense attention")


def _rows(file: Path) -> list[dict]:
    return json.loads(file.read_text())["rows"]
