"""Charts from the JSON of the benchmarks.

    python benchmarks/plot.py ops.json --out charts

One PNG per chart, named after the JSON file: `tight-bytes.png` from `tight.json`. A benchmark
(`meta["benchmark"]`) has its functions in CHARTS; each takes meta and rows, and yields
(name, figure).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from accuracy import charts as accuracy
from decode import charts as decode
from delethink import charts as delethink
from drawing import COLORS, STYLE, by, legend, plt, short, title
from families import charts as families
from language import charts as language

OURS = ("cpu", "cuda", "triton")
PLAIN = re.compile(r"n=\d+$")  # a shape of decode_attention without a variant


# --- bench_ops ------------------------------------------------------------------------------------


def bandwidth(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """GB/s of each implementation by shape, one panel per dtype, the probe as a line."""
    latency = ("select_pages", "select_victims")  # not about bandwidth
    for op, chosen in by(rows, "op").items():
        impls = _impls(chosen)
        chosen = [r for r in chosen if r["gbps"] is not None and r["impl"] != "reference"]
        if op == "decode_attention":
            chosen = [r for r in chosen if PLAIN.search(r["shape"])]
        if not chosen or op in latency:
            continue
        panels = by(chosen, "dtype")
        most = max(len(by(part, "shape")) for part in panels.values())
        figure, axes = plt.subplots(
            len(panels), figsize=(2 + 0.95 * max(most, 4), 1 + 2.2 * len(panels)), squeeze=False
        )
        for axis, (dtype, part) in zip(axes[:, 0], panels.items(), strict=True):
            _bandwidth_panel(axis, part, impls)
            axis.set_ylabel(f"{dtype}, GB/s")
        title(figure, facts, f"{op}: bytes that must be moved per second")
        legend(figure)
        yield f"{op}-bandwidth", figure


def _bandwidth_panel(axis: Axes, rows: list[dict], impls: list[str]) -> None:
    shapes = list(by(rows, "shape"))
    shown = _impls(rows)
    width = 0.8 / len(shown)
    for index, impl in enumerate(shown):
        at = {r["shape"]: r["gbps"] for r in rows if r["impl"] == impl}
        x = [shapes.index(s) + (index - (len(shown) - 1) / 2) * width for s in at]
        bars = axis.bar(x, at.values(), width, color=_color(impl, impls), label=_label(impl))
        axis.bar_label(bars, [short(v) for v in at.values()], fontsize=6, padding=1)
    probe = {r["shape"]: r["gbps"] for r in rows if r["impl"] == "probe"}
    for index, (shape, gbps) in enumerate(probe.items()):
        middle = shapes.index(shape)
        label = "bandwidth probe, same rounds" if index == 0 else None
        axis.hlines(gbps, middle - 0.45, middle + 0.45, colors="#333333", ls="--", label=label)
    axis.set_xticks(range(len(shapes)), [s.replace(" ", "\n") for s in shapes], fontsize=7)
    axis.grid(axis="x", visible=False)


def speedup(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """How many times faster than each baseline, on a log axis; 1 is drawn."""
    for op, chosen in by(rows, "op").items():
        kept = [r for r in chosen if set(r["ratios"]) - {"own-dense"}]
        if not kept or op == "lazy_eviction":
            continue
        baselines = list(dict.fromkeys(b for r in kept for b in r["ratios"] if b != "own-dense"))
        impls = list(dict.fromkeys([*_impls(chosen), *baselines]))  # some are rows of other ops
        figure, panels = _dot_panels(kept, facts, f"{op}: times faster than each baseline")
        for axis, part, at in panels:
            for baseline in baselines:
                points = [
                    (r["ratios"][baseline], at[_name(r)]) for r in part if baseline in r["ratios"]
                ]
                _dots(axis, points, _color(baseline, impls), baseline)
            _dot_axis(axis, at)
        legend(figure)
        yield f"{op}-speedup", figure


def variants(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Paged, sparse and scoring variants against the same kernel dense; the ideal as a bar."""
    kept = [r for r in rows if "own-dense" in r["ratios"]]
    if not kept:
        return
    text = "decode_attention: times faster than the same kernel on all tokens, dense"
    figure, panels = _dot_panels(kept, facts, text)
    for axis, part, at in panels:
        ideal = [r["ideal_ratios"]["own-dense"] for r in part]
        places = [at[_name(r)] for r in part]
        axis.barh(places, ideal, 0.6, color="#DDDDDD", label="what the bytes allow")
        points = [(r["ratios"]["own-dense"], y) for r, y in zip(part, places, strict=True)]
        _dots(axis, points, COLORS[0], "measured")
        _dot_axis(axis, at)
    legend(figure)
    yield "decode_attention-variants", figure


def overhead(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """What tracking and evictions add to the attention of a decode step, in per cent of it."""
    layers = {}
    for row in rows:
        if row["op"] == "lazy_eviction":
            key = f"{row['shape']}  {row['dtype']}".replace(" n=", "\nn=")
            layers.setdefault(key, {})[row["impl"]] = row
    if not layers:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 1.6 + 0.42 * len(layers)), sharey=True)
    bars = (
        (left, [100 * x["tracked, all"]["overhead"] for x in layers.values()], "{:.1f} %"),
        (right, [x["evict"]["ms"] / x["decode"]["ms"] for x in layers.values()], "{:.2g}"),
    )
    for axis, values, form in bars:
        shown = axis.barh(range(len(layers)), values, 0.6, color=COLORS[0])
        axis.bar_label(shown, [form.format(v) for v in values], fontsize=7, padding=2)
        axis.set_yticks(range(len(layers)), list(layers), fontsize=7)
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
    left.invert_yaxis()  # and with it the right one
    left.set_xlabel("tracking, % more time than the attention of a step")
    right.set_xlabel("an eviction, in times the attention of a step")
    left.axvline(5, color="#333333", ls="--", lw=1, label="5 %, or one step")
    right.axvline(1, color="#333333", ls="--", lw=1)
    title(figure, facts, "LazyEviction: what one layer pays")
    legend(figure)
    yield "lazy_eviction-overhead", figure


# --- bench_memory ---------------------------------------------------------------------------------


def memory(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Bytes of all tensors over the tokens generated; on a log axis, as Full outgrows the rest."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    methods = by(rows, "method")
    for index, (name, part) in enumerate(methods.items()):
        x, y = [r["tokens"] for r in part], [r["bytes"] / 1e6 for r in part]
        label = f"{name}, {short(y[-1])} MB"
        # Every other one in dashes: methods with the same budget lie upon each other.
        style = "--" if index % 2 else "-"
        axis.plot(x, y, color=COLORS[index % len(COLORS)], lw=1.6, ls=style, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("tokens generated")
    axis.set_ylabel("MB allocated")
    heads, kv_heads, dim = facts["shape"]
    model = f"{facts['layers']} layers of {heads}/{kv_heads} heads x {dim}, {facts['dtype']}"
    title(figure, facts, f"Memory while decoding, at most {facts['budget']} tokens kept; {model}")
    legend(figure)
    yield "bytes", figure


def long_run(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Slabs on the device, and host memory where there is some, over the tokens decoded."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for index, (name, part) in enumerate(by(rows, "method").items()):
        x = [r["tokens"] for r in part]
        # Every other one in dashes, as above.
        for key, where, style in (
            ("reserved", "", "--" if index % 2 else "-"),
            ("host", ", host memory", ":"),
        ):
            y = [r[key] / 1e6 for r in part]
            if any(y):
                label = f"{name}{where}, {short(y[-1])} MB"
                axis.plot(x, y, color=COLORS[index % len(COLORS)], ls=style, lw=1.8, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.minorticks_off()
    axis.set_xlabel("tokens decoded")
    axis.set_ylabel("MB of K and V, spare room included")
    title(figure, facts, f"A long run on the reasoner, budget {facts['budget']}")
    legend(figure)
    yield "bytes", figure


# --- bench_retrieval ------------------------------------------------------------------------------


def retrieval_share(facts: dict, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """A step of a layer: attention, and on top of it retrieval; then what the link's bytes buy."""
    shown = [r for r in rows if r["part"] == "share" and "step_us" in r]
    if not shown:
        return
    panels = by(shown, "dtype")
    size = (8.4, 1.4 + 1.6 * len(panels))
    figure, axes = plt.subplots(len(panels), 2, figsize=size, sharey=True, squeeze=False)
    for (left, right), (dtype, part) in zip(axes, panels.items(), strict=True):
        part = [r for r in part if r["method"] != "full"]
        names, y = [r["method"] for r in part], range(len(part))
        attention = [r["attention_us"] for r in part]
        more = [max(r["step_us"] - r["attention_us"], 0) for r in part]
        left.barh(y, attention, 0.6, color=COLORS[5], label="attention")
        bars = left.barh(y, more, 0.6, left=attention, color=COLORS[1], label="retrieval")
        shares = [f"{r['retrieval_share']:.0%}, rate {r['rate']:.0%}" for r in part]
        left.bar_label(bars, shares, fontsize=7, padding=3)
        left.margins(x=0.3)
        left.set_yticks(y, names, fontsize=8)
        left.set_xlabel(f"{dtype}: us of a layer's step; retrieval's share")
        bars = right.barh(y, [r["link_bytes"] / 1024 for r in part], 0.6, color=COLORS[2])
        bought = [f"recall {r['recall']:.0%}, error {r['error']:.1%}" for r in part]
        right.bar_label(bars, bought, fontsize=7, padding=3)
        right.margins(x=0.5)
        right.set_xlabel(f"{dtype}: KiB over the link per token")
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()  # and with it all others
    title(
        figure,
        facts,
        f"Retrieval: one layer, {facts['prompt']} tokens, budget {facts['budget']}, queries that"
        " turn every ten steps or so",
    )
    legend(figure)
    yield "share", figure


# --- drawing --------------------------------------------------------------------------------------


def _dot_panels(
    rows: list[dict], facts: dict, text: str
) -> tuple[Figure, list[tuple[Axes, list[dict], dict[str, int]]]]:
    """One panel per dtype. All share their rows, so one without a result leaves a gap."""
    names = {name: place for place, name in enumerate(dict.fromkeys(map(_name, rows)))}
    panels = by(rows, "dtype")
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2.4 + 2.9 * len(panels), 1.5 + 0.27 * len(names)),
        sharey=True,
        squeeze=False,
    )
    for axis, dtype in zip(axes[0], panels, strict=True):
        axis.set_title(dtype)
    title(figure, facts, text)
    return figure, [(axis, panels[d], names) for axis, d in zip(axes[0], panels, strict=True)]


def _dots(axis: Axes, points: list[tuple[float, int]], color: str, label: str) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), "o", ms=5, color=color, label=label)
    for x, y in points:
        axis.annotate(short(x), (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=6)


def _dot_axis(axis: Axes, names: dict[str, int]) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color="#333333", lw=1)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.6), max(high * 1.3, 2.2))
    axis.set_yticks(list(names.values()), list(names), fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.8)  # first row on top
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 else (1,)))
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.minorticks_off()


def _impls(rows: list[dict]) -> list[str]:
    """Ours first."""
    return sorted({r["impl"] for r in rows} - {"probe"}, key=lambda i: (i not in OURS, i))


def _name(row: dict) -> str:
    return f"{row['shape']}  {row['impl']}"


def _label(impl: str) -> str:
    return f"kvcomp {impl}" if impl in OURS else impl


def _color(impl: str, impls: list[str]) -> str:
    """The same for an implementation in all charts of its op: `impls` are all of the op's."""
    return COLORS[impls.index(impl) % len(COLORS)]


# --- command line ---------------------------------------------------------------------------------

CHARTS = {
    "accuracy-study": (accuracy.by_bytes, accuracy.by_attended, accuracy.memory),
    "decode": (decode.times, decode.parts, decode.peers),
    "delethink": (delethink.accuracy, delethink.growth, delethink.carries, delethink.stalls),
    "families": (families.by_bytes, families.by_window),
    "language-loss": (language.by_method,),
    "long-run": (long_run,),
    "memory": (memory,),
    "ops": (bandwidth, speedup, variants, overhead),
    "retrieval": (retrieval_share,),
}


def plot(path: Path, out: Path) -> list[Path]:
    """Draw all charts of one JSON file; the PNGs written."""
    content = json.loads(path.read_text())
    kind = content["meta"]["benchmark"]
    if kind not in CHARTS:
        raise ValueError(f"{path}: no charts for benchmark {kind!r}; known: {', '.join(CHARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for chart in CHARTS[kind]:
            for name, figure in chart(content["meta"], content["rows"]):
                written.append(out / f"{chart_name(path.stem, name)}.png")
                save(figure, written[-1])
    return written


def chart_name(stem: str, name: str) -> str:
    """The file's name before the chart's, unless that begins with it."""
    return name if name == stem or name.startswith(f"{stem}-") else f"{stem}-{name}"


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, half of the size."""
    pixels = io.BytesIO()
    figure.savefig(pixels)
    plt.close(figure)
    Image.open(pixels).convert("RGB").quantize(256).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR")
    options = parser.parse_args(argv)
    try:
        for path in options.files:
            print(*plot(path, options.out), sep="\n")
    except (OSError, ValueError, KeyError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
