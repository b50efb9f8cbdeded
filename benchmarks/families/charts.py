"""Charts of `bench_families.py`."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from drawing import COLORS, by, legend, plt, title


def by_bytes(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Steps right over the bytes that a method may hold, wherever the bound was swept."""
    for part, chosen in by(rows, "part").items():
        shown = [r for r in chosen if r["method"] not in ("full", "lazy without H2")]
        methods = by(shown, "method")
        if all(len({r["bound"] for r in swept}) == 1 for swept in methods.values()):
            continue
        figure, axis = plt.subplots(figsize=(6.6, 4.2))
        ranked = sorted(methods, key=lambda name: -max(r["step_accuracy"] for r in methods[name]))
        others = [name for name in ranked if name != "lazy-eviction"]
        for name in ["lazy-eviction", *others]:
            ours, place = name == "lazy-eviction", others.index(name) if name in others else 0
            axis.plot(
                [r["bound_bytes"] / 2**20 for r in methods[name]],
                [100 * r["step_accuracy"] for r in methods[name]],
                color=COLORS[0] if ours else COLORS[1 + place % (len(COLORS) - 1)],
                ls="-" if ours else ("--", ":", "-.")[place // (len(COLORS) - 1)],
                lw=2.6 if ours else 1.3,
                marker="o" if ours else None,
                ms=4,
                label=name,
                zorder=3 if ours else 2,
            )
        axis.set_xlabel("MiB of K and V that a sequence may hold (budget + window)")
        axis.set_ylabel("steps right, %")
        title(figure, facts, f"{part}: accuracy at equal bytes, alpha {facts['alpha']:g}")
        legend(figure)
        yield f"{part}-bytes", figure


def by_window(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """A table, method by window, wherever the windows were swept: lag and score told apart."""
    for part, chosen in by(rows, "part").items():
        chosen = [r for r in chosen if r["method"] != "full"]
        methods = by(chosen, "method")
        if all(len({r["window"] for r in swept}) == 1 for swept in methods.values()):
            continue
        windows = sorted({r["window"] for r in chosen})
        names = sorted(methods, key=lambda name: -max(r["step_accuracy"] for r in methods[name]))
        values = [
            [
                100 * next(r["step_accuracy"] for r in methods[n] if r["window"] == w)
                for w in windows
            ]
            for n in names
        ]
        size = (3.4 + 0.9 * len(windows), 1.2 + 0.27 * len(names))
        figure, axis = plt.subplots(figsize=size)
        axis.imshow(values, cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(windows)), [f"every {w}" for w in windows])
        axis.set_yticks(range(len(names)), names)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.grid(visible=False)
        kib = chosen[0]["bound_bytes"] / 2**20
        title(figure, facts, f"{part}: steps right, %, by steps between evictions; {kib:.2g} MiB")
        yield f"{part}-windows", figure
