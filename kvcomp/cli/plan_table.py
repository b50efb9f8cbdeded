"""What `kvcomp plan` prints: the facts, a table of methods, and what the figures leave out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kvcomp import Delethink, Method

if TYPE_CHECKING:
    from kvcomp.plan import Plan, Row


def headline(found: Plan) -> Iterator[str]:
    """Model, device, and what a step of dense attention is made of."""
    model, device = found.model, found.device
    layers = [f"{model.layers} full-attention layers"]
    if model.windows:
        windows = ", ".join(str(window) for window in sorted(set(model.windows)))
        layers.append(f"{len(model.windows)} sliding (window {windows})")
    if model.linear:
        layers.append(f"{model.linear} others, whose state is not counted")
    experts = f" ({model.active} of {model.experts} experts a token)" if model.routed else ""
    verdict = "fits" if found.fits else "does not fit"
    if model.weights > device.memory:
        verdict += ", nor do the weights alone"
    as_kv = found.weights_read / found.kv_per_token  # tokens
    yield (
        f"[bold]{escape(model.name)}[/bold]  {model.dtype}, {' and '.join(layers)}, {model.heads}"
        f" query and {model.kv_heads} KV heads of {model.head_dim}"
    )
    yield (
        f"weights  {_size(model.weights)}; a step reads {_size(found.weights_read)}{experts}, as"
        f" much as the KV of {as_kv:,.0f} tokens"
    )
    yield (
        f"KV       {found.kv_per_token / 1024:g} KiB a token, {_size(found.kv_per_sequence)} a"
        f" sequence of {found.context}, {_size(found.kv_total)} in all"
    )
    yield (
        f"device   {device.name}: {device.bandwidth / 1e9:.4g} GB/s ({device.source}),"
        f" {_size(device.memory)} for weights and KV"
    )
    yield (
        f"a step   {_size(found.weights_read + found.kv_total)}, {found.kv_share:.0%} of it KV: at"
        f" least [bold]{found.floor_ms:.3g} ms[/bold]; dense, batch {found.batch} {verdict}"
    )
    if model.positions is not None and found.context > model.positions:
        yield f"         the model knows {model.positions} positions, fewer than this context has"


def table(found: Plan) -> Table:
    """A row for each method; see `notes` for the columns."""
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
    """What the columns say, and what the floors leave out."""
    yield (
        "attended: tokens, per full-attention layer; at most: the speed-up that the bytes allow;"
        " scored: with what is read and written to choose"
    )
    yield (
        f"KV held: on the device, a sequence; sequences: of {found.context} tokens that fit;"
        f" longest: context that fits with batch {found.batch}; tokens/s: at most, all that fit"
    )
    yield "not in these figures: computation, launches, activations"
    for row in found.rows:
        if row.link_bytes:
            ms = "" if row.link_ms is None else f" ({row.link_ms:.3g} ms)"
            yield (
                f"  nor, of {row.method}, up to {_size(row.link_bytes)}{ms} a step from host"
                f" memory, where a sequence has {_size(row.kv_host)}"
            )
        if row.encoded:
            ms = "" if row.encode_ms is None else f" ({row.encode_ms:.3g} ms a step)"
            yield f"  nor, of {row.method}, {row.encoded:.2f} tokens encoded anew for each{ms}"
    decoded = found.context - found.prompt
    for method in methods:
        if isinstance(method, Delethink) and method.budget and decoded > method.budget:
            yield f"{method.name} ends after {method.budget} tokens of output (max_chunks)"


def _size(count: float) -> str:
    """Bytes, in the decimal units of bandwidths."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
