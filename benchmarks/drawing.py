"""What all charts share: colours, style, titles and legends."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.figure import Figure

__all__ = ["COLORS", "STYLE", "by", "legend", "plt", "short", "title"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; ours first.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "savefig.dpi": 110,
}


def title(figure: Figure, facts: dict, text: str) -> None:
    figure.set_layout_engine("constrained")
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    version = f"kvcomp {facts['kvcomp']}, torch {facts['torch']}"
    figure.suptitle(f"{text}\n{machine}; {version}", x=0.01, ha="left", fontsize=9)


def legend(figure: Figure) -> None:
    """One for all panels, each label once."""
    labels: dict[str, Artist] = {}
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    columns = max(2, int(figure.get_figwidth() / 1.7))
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=columns, fontsize=7.5
    )


def by(rows: list[dict], key: str) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"
