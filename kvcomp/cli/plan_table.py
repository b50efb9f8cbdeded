"""The output of `kvcomp plan`: model and device, a table of methods, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kvcomp import Delethink, Method

if TYPE_CHECKING:
    from kvcomp.plan import Plan, Row


def headline(found: Plan) -> Iterator[str]:
    """Model, device, and a step with dense attention."""
    model, device = found.model, found.device
    layers = [f"{model.layers} full-attention layers"]
    if model.windows:
        windows = ", ".join(str(window) for window in sorted(set(model.windows)))
        layers.append(f"{len(model.windows)} sliding (window {windows})")
    if model.linear:
        layers.append(f"{model.linear} linear (state not counted)")
    experts = f" ({model.active} of {model.experts} experts per token)" if model.routed else ""
    verdict = "fits" if found.fits else "does not fit"
    if model.weights > device.memory:
        verdict += ", nor do the weights alone"
    as_kv = found.weights_read / found.kv_per_token  # tokens
    eight = "in eight bits, " if model.kv == "int8" else ""
    heads = f"{model.heads} query and {model.kv_heads} KV heads of {model.head_dim}"
    if model.value_dim == 0:
        heads = f"{model.heads} query heads over latents of {model.head_dim} values a token"
    yield f"[bold]{escape(model.name)}[/bold]  {model.dtype}, {' and '.join(layers)}, {heads}"
    yield (
        f"weights  {_size(model.weights)}; a step reads {_size(found.weights_read)}{experts}, equal"
        f" to the KV of {as_kv:,.0f} tokens"
    )
    yield (
        f"KV       {eight}{found.kv_per_token / 1024:g} KiB per token,"
        f" {_size(found.kv_per_sequence)} per sequence of {found.context} tokens,"
        f" {_size(found.kv_total)} in all"
    )
    yield (
        f"device   {device.name}: {device.bandwidth / 1e9:.4g} GB/s ({device.source}),"
        f" {_size(device.memory)} for weights and KV"
    )
    yield (
        f"step     reads {_size(found.weights_read + found.kv_total)}, {found.kv_share:.0%} of it"
        f" KV: at least [bold]{found.floor_ms:.3g} ms[/bold]; dense, batch {found.batch} {verdict}"
    )
    if model.positions is not None and found.context > model.positions:
        yield f"         the model knows only {model.positions} positions; this context has more"


def table(found: Plan) -> Table:
    """One row per method; `notes` explains the columns."""
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    out.add_column("method", no_wrap=True)
    headings = ["attended", "KV read", "step", "at most", "scored"]
    if found.generate is not None:
        headings.append(f"over {found.generate}")
    headings += ["KV held", "sequences", "longest", "tokens/s"]
    for heading in headings:
        out.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        out.add_row(row.method, *_cells(row))
    return out


def _cells(row: Row) -> Iterator[str]:
    yield f"{row.attended:.0f}"
    yield _size(row.kv_read)
    yield f"{row.floor_ms:.3g} ms"
    yield f"{row.speedup:.2f}x"
    yield f"{row.speedup_scored:.2f}x"
    if row.speedup_generation is not None:
        yield f"{row.speedup_generation:.2f}x"
    yield _size(row.kv_held)
    yield str(row.sequences)
    yield "any" if row.longest is None else str(row.longest)
    yield f"{row.tokens_per_second:.0f}"


def notes(found: Plan, methods: list[Method]) -> Iterator[str]:
    """What the columns mean, and what the bounds leave out."""
    over = f" over full with K and V in {found.model.dtype}" if found.model.kv == "int8" else ""
    yield (
        "attended: tokens per full-attention layer; step: at least; at most: upper bound for the"
        f" speed-up{over}; scored: the same, including what is read and written to select tokens"
    )
    yield (
        f"KV held: on the device, per sequence; sequences: how many of {found.context} tokens fit;"
        f" longest: longest context that fits with batch {found.batch}; tokens/s: at most, with all"
        " sequences that fit"
    )
    yield "not included: computation, launches, activations"
    for row in found.rows:
        if row.link_bytes:
            ms = "" if row.link_ms is None else f" ({row.link_ms:.3g} ms)"
            yield (
                f"  {row.method}: up to {_size(row.link_bytes)}{ms} per step copied from host"
                f" memory, which holds {_size(row.kv_host)} per sequence"
            )
        if row.encoded:
            ms = "" if row.encode_ms is None else f" ({row.encode_ms:.3g} ms per step)"
            yield f"  {row.method}: {row.encoded:.2f} tokens encoded again per decoded token{ms}"
    decoded = found.context - found.prompt
    for method in methods:
        if isinstance(method, Delethink) and method.budget and decoded > method.budget:
            yield f"{method.name} ends after {method.budget} output tokens (max_chunks)"


def _size(count: float) -> str:
    """Bytes in decimal units, like bandwidths."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
