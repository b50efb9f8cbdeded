"""Charts of the loss on real text: every method at each bound, and lines over the bounds."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawing import COLORS, by, plt, title
from harness.store import Row
from language.loss import summaries

OURS = ("delta", "lazy-eviction", "louis-kv")
GREY = "#7F7F7F"
SMALLEST = 5e-4  # nats per token, where the logarithmic axis begins


def by_method(facts: dict, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    """Loss above dense attention, a panel for each bound, the best method on top."""
    panels = by([s for s in summaries(rows) if "d_nll" in s and s["method"] != "full"], "bound")
    if not panels:
        return
    most = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 1.5 + 0.28 * most), squeeze=False
    )
    for axis, (bound, part) in zip(axes[0], panels.items(), strict=True):
        part = sorted(part, key=lambda s: s["d_nll"])
        for place, summary in enumerate(part):
            low, high = summary["d_nll_interval"]
            value, color = summary["d_nll"], _color(summary)
            spread = [[value - low], [high - value]]
            axis.errorbar(value, place, xerr=spread, fmt="o", ms=5, color=color, capsize=2)
        keeping = {True: ", which keeps all", False: ""}
        names = [s["method"] + keeping[s["keeps_all"]] for s in part]
        axis.set_yticks(range(len(part)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("symlog", linthresh=SMALLEST)
        axis.set_xlim(left=0)
        axis.axvline(0.02, color="#333333", lw=0.8, ls=":")
        axis.set_xlabel(f"loss above dense attention, nats per token; {bound} of the bytes")
    model = facts["settings"]
    windows = len(model["windows"])
    text = f"{model['model']}, {model['dtype']}: {windows} windows of {model['tokens']} tokens"
    title(figure, facts, text)
    yield "methods", figure


def over_bytes(axis: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    """Lines of loss above dense attention over the bound; variants are left out."""
    lines = by([s for s in summaries(rows) if "d_nll" in s and ":" not in s["method"]], "method")
    label: str | None = "baselines"
    for name, points in lines.items():
        if name == "full":
            continue
        points = sorted(points, key=lambda s: Fraction(s["bound"]))
        x, y = [100 * float(Fraction(s["bound"])) for s in points], [s["d_nll"] for s in points]
        if name in colors:
            axis.plot(x, y, "-o", ms=5, lw=2, color=colors[name], zorder=3)
        else:
            axis.plot(x, y, "-o", ms=3, lw=0.9, color="#BBBBBB", label=label)
            if len(points) > 1:  # single points lie too close together for names
                axis.annotate(name, (x[-1], y[-1]), (4, 0), textcoords="offset points", fontsize=6)
            label = None
    axis.set_yscale("log")
    axis.set_xlabel("bytes on the device, % of all (delta: tokens of a sparse layer)")


def _color(summary: Row) -> str:
    name = summary["method"].partition(":")[0]
    return COLORS[1 + OURS.index(name)] if name in OURS else GREY
