"""Charts of the study: accuracy over bytes and over tokens attended, and bytes over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accuracy.summary import Summary, summarize
from drawing import COLORS, legend, plt, title

GREY, LIGHT = "#7F7F7F", "#BBBBBB"
DASHES = ("-", "--", ":", "-.")
RIGHT = 0.6  # of the axis, from where on a line that begins there has its name to the right
APART = 0.036  # of the axis, between the middles of two names


def by_bytes(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """What is right over the most bytes that a sequence held on the device."""
    whole = facts["context_bytes"]
    if all(row["reason"] for row in rows):
        return
    figure, axis = _frame(rows, lambda s: 100 * s.peak_bytes / whole)
    axis.set_xlabel(
        f"most bytes of K, V and what stands for them on the device, % of {whole / 2**20:.1f} MiB"
        " (all K and V of a sequence)"
    )
    title(figure, facts, _text(facts, rows, "at equal bytes"))
    yield "bytes", figure


def by_attended(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """What is right over the tokens that a layer attended to, on average."""
    if all(row["reason"] for row in rows):
        return
    figure, axis = _frame(rows, lambda s: 100 * s.attended)
    axis.set_xlabel("tokens attended, % of dense attention's (mean over steps and layers)")
    title(figure, facts, _text(facts, rows, "over tokens attended"))
    yield "attended", figure


def memory(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """K and V that a sequence held while it was decoded, at the bound in the middle."""
    traced = [row for row in rows if row["reason"] is None and row["trace"]]
    limits = {
        r["bound"]: r["bound_bytes"] for r in traced if r["bound_bytes"] and not r["keeps_all"]
    }
    if not limits:
        return
    bound, limit = sorted(limits.items(), key=lambda item: item[1])[len(limits) // 2]
    figure, axis = plt.subplots(figsize=(6.6, 4.0))
    shown = [r for r in traced if r["bound"] == bound and not r["baseline"]]
    full = [r for r in traced if r["method"] == "full"][:1]
    others = [r for r in traced if r["bound"] == bound and r["method"] == "random-eviction"]
    colors = _colors(rows)
    for row in (*full, *others, *shown):
        tokens, held = zip(*row["trace"], strict=True)
        color, strong = colors.get(row["method"], GREY), row["method"] in colors
        style = "--" if row["keeps_all"] else "-"
        mebibytes = [b / 2**20 for b in held]
        name = row["method"] + (", which keeps all" if strong and row["keeps_all"] else "")
        axis.plot(tokens, mebibytes, style, color=color, lw=2 if strong else 1.3, label=name)
    axis.axhline(limit / 2**20, color="#333333", lw=0.8, ls=":", label=f"the bound, {bound} of all")
    axis.set_xlabel("tokens generated")
    axis.set_ylabel("MiB of K and V, a sequence")
    axis.set_ylim(bottom=0)
    title(figure, facts, "K and V on the device while decoding")
    legend(figure)
    yield "memory", figure


def _frame(rows: list[dict], place: Callable[[Summary], float]) -> tuple[Figure, Axes]:
    """Lines of all methods with their intervals, and their names in columns beside them."""
    found = [s for s in summarize(rows) if s.reason is None]
    figure, axis = plt.subplots(figsize=(8.6, 5.6))
    colors, ends = _colors(rows), []
    styles = cycle(DASHES)
    methods: dict[str, list[Summary]] = {}
    for summary in found:
        methods.setdefault(summary.method, []).append(summary)
    for name, points in methods.items():
        points = sorted(points, key=place)
        x, y = [place(s) for s in points], [100 * s.score.mean for s in points]
        bars = [
            [100 * (s.score.mean - s.score.low) for s in points],
            [100 * (s.score.high - s.score.mean) for s in points],
        ]
        ours = name in colors
        color = colors.get(name, GREY)
        axis.errorbar(
            x,
            y,
            bars,
            color=color if ours else LIGHT,
            ls="-" if ours else next(styles),
            lw=2.4 if ours else 1.0,
            marker="o",
            ms=5 if ours else 2.5,
            elinewidth=1.2 if ours else 0.6,
            capsize=2 if ours else 0,
            zorder=4 if ours else 2,
        )
        ends.append(((x[0], y[0]), (x[-1], y[-1]), name, color))
    axis.set_xscale("log")
    places = [place(s) for s in found]
    low, high = min(places) * 0.93, 108
    axis.set_xlim(low, high)
    ticks = [t for t in (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 100) if low <= t <= high]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    bottom = min(100 * s.score.low for s in found)
    axis.set_ylim(max(bottom - 4, -4), 104)
    axis.set_title("steps right, %" if found[0].steps else "answers right, %", loc="left")
    middle = low * (high / low) ** RIGHT
    left = [(*first, *name) for first, _, *name in ends if first[0] < middle]
    right = [(*last, *name) for first, last, *name in ends if first[0] >= middle]
    _names(axis, -0.09, left)
    _names(axis, 1.02, right)
    return figure, axis


def _names(axis: Axes, side: float, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each name at the height of its line's end (x, y), or as near as the others let it; `side` is
    where, in widths of the axis."""
    bottom, top = axis.get_ylim()
    gap = APART * (top - bottom)
    ends = sorted(ends, key=lambda end: end[1])
    heights = [y for _, y, *_ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    for index in range(len(heights) - 1, -1, -1):  # back under the top
        above = heights[index + 1] if index + 1 < len(heights) else top + gap
        heights[index] = min(heights[index], above - gap)
    for height, (x, y, name, color) in zip(heights, ends, strict=True):
        axis.annotate(
            name,
            (x, y),
            (side, (height - bottom) / (top - bottom)),
            textcoords="axes fraction",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=8,
            color=color,
            weight="normal" if color == GREY else "bold",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4, "alpha": 0.5, "shrinkB": 3},
        )


def _colors(rows: list[dict]) -> dict[str, str]:
    """Of the methods that are no baselines, in the order of their names."""
    ours = sorted({row["method"] for row in rows if not row["baseline"]})
    return dict(zip(ours, cycle(COLORS[:6])))


def _text(facts: dict, rows: list[dict], what: str) -> str:
    settings = facts["settings"]
    count = max(summary.problems for summary in summarize(rows))
    return (
        f"{settings['model']}: {count} answers a point, up to {facts['context']} tokens, {what};"
        " 95 % intervals"
    )
