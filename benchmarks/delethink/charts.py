"""Charts of bench_delethink.py; a part that was not run has none."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from drawing import COLORS, by, legend, plt, short, title

METHODS = {"delethink": ("Delethink", COLORS[0]), "full": ("dense attention", COLORS[1])}
KNOWN = 4096  # positions of the reasoner


def accuracy(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Steps right in each chunk over the tokens thought, one panel per size of problem."""
    shown = [r for r in rows if r["part"] == "scaling" and "peak_bytes" in r]
    if not shown:
        return
    panels = by(shown, "nodes")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 3.6 * len(panels), 3.4), sharey=True, squeeze=False
    )
    for axis, (nodes, part) in zip(axes[0], panels.items(), strict=True):
        for method, windows in by(part, "method").items():
            label, color = METHODS[method]
            axis.plot(
                [r["tokens"] for r in windows],
                [100 * r["step_accuracy"] for r in windows],
                color=color, label=label, marker="o", ms=3,
            )  # fmt: skip
        prompt = 6 * nodes + 4
        axis.axvline(KNOWN - prompt, color="#333333", ls="--", lw=1, label="positions end")
        axis.set_title(f"{nodes} nodes, prompt of {prompt} tokens")
        axis.set_xlabel("tokens thought")
    axes[0, 0].set_ylabel("steps right in the chunk, %")
    schedule = f"C = {facts['chunk']}, m = {facts['carry']}, h = {facts['head']}"
    title(figure, facts, f"The reasoner thinks for longer than it knows; {schedule}")
    legend(figure)
    yield "accuracy", figure


def growth(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """K and V, and time per token, over the tokens thought."""
    shown = [r for r in rows if r["part"] == "curve"]
    if not shown:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4))
    for method, part in by(shown, "method").items():
        label, color = METHODS[method]
        tokens = [r["tokens"] for r in part]
        left.plot(tokens, [r["kept_bytes"] / 2**20 for r in part], color=color, label=label)
        right.plot(tokens, [r["ms"] for r in part], color=color, label=label)
        if any(r["boundary_s"] for r in part):
            means = [r["ms_mean"] for r in part]
            right.plot(tokens, means, color=color, ls="--", label=f"{label}, with boundaries")
    for axis, what in ((left, "MiB of K and V"), (right, "ms per token")):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens thought")
        axis.set_ylabel(what)
    schedule = f"C = {facts['chunk']}, m = {facts['carry']}, h = {facts['head']}"
    title(figure, facts, f"What grows; half of Qwen3-0.6B in width, 8 layers, fp32; {schedule}")
    legend(figure)
    yield "growth", figure


def carries(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Steps right over the carry, by chunk, where nothing else holds the state."""
    shown = [r for r in rows if r["part"] == "sweep" and r["what"] != "head"]
    if not shown:
        return
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for index, (chunk, part) in enumerate(sorted(by(shown, "chunk").items())):
        points = sorted((r["carry"], 100 * r["step_accuracy"]) for r in part)
        axis.plot(
            *zip(*points, strict=True),
            color=COLORS[index], marker="o", ms=4, label=f"chunk {chunk}",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("tokens carried; a step of the walk has 4")
    axis.set_ylabel("steps right, %")
    title(figure, facts, f"How little may be carried; {facts['sweep_tokens']} tokens thought")
    legend(figure)
    yield "carries", figure


def stalls(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """How long decoding stands still at a boundary, with a free core and without."""
    shown = [r for r in rows if r["part"] == "stall"]
    if not shown:
        return
    panels = by(shown, "threads")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.6 + 3.2 * len(panels), 2.6), sharey=True, squeeze=False
    )
    for axis, part in zip(axes[0], panels.values(), strict=True):
        names = [r["reset"] if r["piece"] is None else f"{r['reset']}, {r['piece']}" for r in part]
        values = [1e3 * r["stall_s"] for r in part]
        bars = axis.barh(range(len(part)), values, 0.6, color=COLORS[0])
        hidden = ["" if r["hidden"] is None else f", {r['hidden']:.0%} hidden" for r in part]
        rates = [f", {short(r['tokens_per_second'])} tokens/s" for r in part]
        labels = [f"{short(v)} ms{h}{t}" for v, h, t in zip(values, hidden, rates, strict=True)]
        axis.bar_label(bars, labels, fontsize=7, padding=3)
        axis.margins(x=0.8)
        axis.set_yticks(range(len(part)), names)
        axis.grid(axis="y", visible=False)
        cores = f"{part[0]['threads']} of {part[0]['cores']} cores decode"
        axis.set_xlabel(f"ms at a boundary, {cores}")
    axes[0, 0].invert_yaxis()  # and with it the others
    title(figure, facts, "How long decoding stands still; streaming by its piece")
    yield "boundaries", figure
