"""Charts of `bench_decode.py`."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from drawing import COLORS, by, legend, plt, short, title

PARTS = {"attention": 5, "update": 1, "linear": 2, "norm": 3, "rest": 6}  # and their colours
STOCK = "hf dynamic"


def _models(rows: list[dict], part: str) -> Iterator[tuple[str, str, list[dict]]]:
    """A name for the file, one for the title, and the rows of one model and batch size."""
    for shape, same in by([r for r in rows if r["part"] == part], "shape").items():
        for batch, chosen in by(same, "batch").items():
            yield (
                f"{shape}-{batch}",
                f"{shape}, random weights, {same[0]['dtype']}, batch {batch}",
                chosen,
            )


def times(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """ms of a step over the context, and under each method what its bytes would take."""
    for name, model, chosen in _models(rows, "step"):
        figure, axis = plt.subplots(figsize=(6.6, 4.2))
        for index, (method, part) in enumerate(by(chosen, "name").items()):
            part = sorted(part, key=lambda r: r["tokens"])
            color = "#333333" if method == STOCK else COLORS[index % len(COLORS)]
            x, y = [r["tokens"] for r in part], [r["ms"] for r in part]
            axis.plot(x, y, "o-", color=color, ms=4, lw=1.6, label=f"{method}, {short(y[-1])} ms")
            axis.plot(x, [r["ceiling_ms"] for r in part], ":", color=color, lw=1)
        axis.plot([], [], ":", color="#333333", label="its bytes at the probe's rate")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        contexts = sorted({r["tokens"] for r in chosen})
        axis.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xlabel("tokens seen")
        axis.set_ylabel("ms per step")
        title(figure, facts, f"One decode step of {model}")
        legend(figure)
        yield f"{name}-times", figure


def parts(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """How a step divides, a panel per context; how long it takes behind each bar. A compiled step
    has no parts that could be timed."""
    divided = [r for r in rows if any(r.get(f"{key}_ms") for key in PARTS)]
    for name, model, chosen in _models(divided, "step"):
        panels = by(chosen, "tokens")
        names = list(by(chosen, "name"))
        size = (1.6 + 2.6 * max(2, len(panels)), 1.4 + 0.3 * len(names))
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for axis, (tokens, part) in zip(axes[0], panels.items(), strict=True):
            y = [names.index(r["name"]) for r in part]
            lengths = [{key: max(r.get(f"{key}_ms", 0.0), 0.0) for key in PARTS} for r in part]
            left = [0.0] * len(part)
            for key, color in PARTS.items():
                widths = [100 * ms[key] / sum(ms.values()) for ms in lengths]
                bars = axis.barh(y, widths, 0.65, left=left, color=COLORS[color], label=key)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            texts = [f"{short(r['ms'])} ms, {short(r['speedup'])}x" for r in part]
            axis.bar_label(bars, texts, fontsize=7, padding=3)
            axis.set_xlim(0, 165)
            axis.set_xticks((0, 50, 100))
            axis.set_title(f"{tokens} tokens")
            axis.set_xlabel("% of a step")
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.grid(axis="y", visible=False)
        axes[0, 0].invert_yaxis()  # and with it all others
        title(figure, facts, f"Where a decode step of {model} goes; times as fast as {STOCK}")
        legend(figure)
        yield f"{name}-parts", figure


def peers(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """ms of a step of each engine, a panel per length; behind each bar, kvcomp against it."""
    chosen = [r for r in rows if "kvcomp_ahead" in r]
    if not chosen:
        return
    panels = by(chosen, "tokens")
    names = list(by(chosen, "name"))
    size = (1.8 + 2.3 * len(panels), 1.2 + 0.27 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (tokens, part) in zip(axes[0], panels.items(), strict=True):
        longest = max(r["ms"] for r in part)
        colors = [COLORS[0] if r["name"].startswith("kvcomp") else COLORS[6] for r in part]
        bars = axis.barh([names.index(r["name"]) for r in part], [r["ms"] for r in part], 0.7)
        for bar, color in zip(bars, colors, strict=True):
            bar.set_color(color)
        texts = [f"{short(r['ms'])}, {r['kvcomp_ahead']:.2f}x" for r in part]
        axis.bar_label(bars, texts, fontsize=7, padding=3)
        axis.set_xlim(0, 1.45 * longest)
        axis.set_title(f"{tokens} tokens")
        axis.set_xlabel("ms per step")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    model, batch = chosen[0]["model"], chosen[0]["batch"]
    text = f"One decode step of {model}, batch {batch}; behind it, how many times as fast kvcomp is"
    title(figure, facts, text)
    yield "steps", figure
