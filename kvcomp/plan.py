"""Bounds on decoding, from the shape of a model alone: time, memory, and a method's best speed-up.

Decoding is limited by memory bandwidth. A step reads the weights once for all sequences, and once
per sequence the K and V that attention needs; these bytes over the bandwidth are a lower bound for
its time. The bound of dense attention over the bound of a method is the largest speed-up that the
method can give; no kernel exceeds it.

Each method states what it reads and holds (`Method.step_bytes`), for the full-attention layers.
Sliding layers count with their window, for dense attention and methods alike; the states of linear
layers are not counted.

With K and V in eight bits, the first row has dense attention over them, and speed-ups are over
dense attention as the model makes K and V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvcomp.cache.rows import KINDS
from kvcomp.checks import require, require_one_of
from kvcomp.methods import Full, Method
from kvcomp.methods.cost import Place, StepBytes

MEASURED = "measured: copy, read + write"
SHEET = 0.9  # share of a data sheet's bandwidth that a large copy reaches on an H200
LONGEST = 2**40  # tokens of a batch; a sequence that fits with so many may have any length
PIECES = 512  # points over which a generation is averaged


@dataclass(frozen=True)
class Device:
    """A device to decode on.

    Attributes:
        bandwidth: memory bandwidth, bytes per second.
        memory: bytes available to weights, K and V, without the runtime and activations.
        link: bytes per second from pinned host memory; None: unknown, or no link.
        flops: 16-bit matrix-product operations per second; None: unknown.
        source: origin of the bandwidth, for people.
    """

    name: str
    bandwidth: float
    memory: float
    link: float | None = None
    flops: float | None = None
    source: str = f"{SHEET} of the data sheet"


# Memory: what CUDA reports, less some GiB for its context, workspaces and activations.
DEVICES = {
    device.name: device
    for device in (
        Device("h200", 4.3e12, 135 * 2**30, 55e9, 790e12, MEASURED),
        Device("b200", SHEET * 8.0e12, 172 * 2**30, 55e9),
        Device("h100", SHEET * 3.35e12, 75 * 2**30, 55e9),
        Device("a100", SHEET * 2.039e12, 75 * 2**30, 25e9),
        Device("rtx-4090", SHEET * 1.008e12, 22 * 2**30, 25e9),
    )
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        name: for people.
        dtype: data type of weights, K and V.
        itemsize: bytes of one value of K or V.
        layers: number of full-attention layers, which a method manages.
        heads, kv_heads, head_dim: query heads, KV heads and head size of an attention layer.
        parameters: number of parameters that a token passes through.
        weights: bytes of all weights.
        fixed: bytes of weights that every step reads: linear layers and LM head, no routed expert.
        routed: bytes of all routed experts. Each layer has `experts`, a token uses `active`.
        windows: window of each sliding layer, in tokens.
        window_row: values of K and V of a token in a sliding layer; None: as in the others.
        shared: number of layers that read K and V of a full-attention layer, and hold none.
        shared_windows: windows of those that read a sliding layer's.
        linear: number of layers whose state does not grow.
        positions: positions that the model knows; None: no limit.
        value_dim: values of V of a token and KV head; None: head_dim. 0 in latent attention (MLA),
            whose one row a token is the key, and V a part of it.
        kv: "int8": full-attention layers keep K and V in eight bits; "model": as the model makes
            them. Sliding layers always do.
    """

    name: str
    dtype: str
    itemsize: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    weights: int
    fixed: int
    routed: int = 0
    experts: int = 1
    active: int = 1
    windows: tuple[int, ...] = ()
    window_row: int | None = None
    shared: int = 0
    shared_windows: tuple[int, ...] = ()
    linear: int = 0
    positions: int | None = None
    value_dim: int | None = None
    kv: str = "model"

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a step with this many tokens reads.

        Only experts that some token uses are read. If tokens chose experts evenly and
        independently, these would be experts * (1 - (1 - active / experts)^tokens).
        """
        idle = (1 - self.active / self.experts) ** tokens
        return self.fixed + self.routed * (1 - idle)

    @property
    def kv_per_token(self) -> int:
        """Bytes of K and V per token, in all full-attention layers."""
        return self.layers * self.place(1, 0).token_bytes

    def sliding_bytes(self, seen: float, windows: tuple[int, ...] | None = None) -> float:
        """Bytes of K and V of the sliding layers, or of layers with other windows; one sequence."""
        values = 2 * self.kv_heads * self.head_dim if self.window_row is None else self.window_row
        tokens = sum(min(seen, window) for window in (self.windows if windows is None else windows))
        return tokens * values * self.itemsize

    def place(self, seen: float, prompt: int) -> Place:
        sizes = self.layers, self.heads, self.kv_heads, self.head_dim, self.itemsize
        return Place(seen, prompt, *sizes, self.value_dim, self.kv == "int8")


@dataclass(frozen=True)
class Row:
    """The bounds of one method.

    Attributes:
        method: name of the method.
        parameters: the method with all its fields.
        attended: mean number of tokens whose K and V a full-attention layer reads in a step; if
            each query head has its own copy, every copy counts.
        kv_read: bytes of K and V that a step reads, for the whole batch, sliding layers included.
        floor_ms: lower bound for the time of a step, in ms.
        speedup: upper bound for the speed-up over dense attention, with K and V as the model makes
            them.
        speedup_scored: the same, counting also what the method moves in order to select: logits,
            digests, page tables.
        kv_held: bytes of K and V on the device, per sequence.
        kv_host: bytes of K and V in host memory, per sequence.
        sequences: number of sequences with this context that fit next to the weights.
        longest: longest context that fits with this batch; None: any.
        tokens_per_second: upper bound, with as many sequences as fit.
        link_bytes: most bytes copied from host memory in a step, whole batch; not in floor_ms.
        link_ms: time of that copy; None: the device's link is unknown.
        encoded: tokens encoded again per decoded token; not in floor_ms.
        encode_ms: time of that per step; None: the device's rate is unknown.
        speedup_generation: upper bound for the speed-up over a whole generation; None: not asked.
    """

    method: str
    parameters: str
    attended: float
    kv_read: float
    floor_ms: float
    speedup: float
    speedup_scored: float
    kv_held: float
    kv_host: float
    sequences: int
    longest: int | None
    tokens_per_second: float
    link_bytes: float
    link_ms: float | None
    encoded: float
    encode_ms: float | None
    speedup_generation: float | None


@dataclass(frozen=True)
class Plan:
    """The bounds of dense attention, and a row for it and for each method.

    Attributes:
        context: tokens of each of `batch` sequences; `prompt` of them are the prompt.
        generate: length of the generation for `speedup_generation`, in tokens.
        weights_read: bytes of weights that a step reads.
        kv_per_token, kv_per_sequence, kv_total: bytes of K and V with dense attention.
        kv_share: K and V as a share of all bytes that a step reads.
        floor_ms: lower bound for the time of a step, in ms.
        fits: whether weights, K and V fit the device.
    """

    model: Shape
    device: Device
    context: int
    batch: int
    prompt: int
    generate: int | None
    weights_read: float
    kv_per_token: int
    kv_per_sequence: float
    kv_total: float
    kv_share: float
    floor_ms: float
    fits: bool
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def plan(
    model: Shape,
    device: Device,
    methods: Sequence[Method] = (),
    *,
    context: int,
    batch: int = 1,
    prompt: int = 0,
    generate: int | None = None,
    kv: str = "model",
) -> Plan:
    """Bounds for a decode step at `context` tokens, by method.

    Args:
        model: see `kvcomp.hf.shape.shape_of`.
        device: one of `DEVICES`, or your own.
        methods: dense attention is always added, as the first row.
        context: tokens of a sequence, prompt and output.
        batch: number of sequences of that length.
        prompt: tokens of the context that belong to the prompt.
        generate: also average over a generation of this many tokens after the prompt.
        kv: how K and V are kept, see `Shape`.

    Raises:
        ValueError: a number out of range, or a method whose parameters do not fit the model.
    """
    for name, value, least in (
        ("context", context, 1),
        ("batch", batch, 1),
        ("prompt", prompt, 0),
        ("generate", 1 if generate is None else generate, 1),
    ):
        require(value >= least, f"kvcomp.plan: {name}", f"at least {least}", value)
    for name, value in (("context", context), ("generate", generate or 0)):
        require(value <= LONGEST, f"kvcomp.plan: {name}", f"at most 2^40 = {LONGEST} tokens", value)
    expected = f"at most {LONGEST // context}, which is 2^40 tokens in all at context={context}"
    require(batch <= LONGEST // context, "kvcomp.plan: batch", expected, batch)
    expected = f"fewer tokens than context={context}"
    require(prompt < context, "kvcomp.plan: prompt", expected, prompt)
    for name in ("bandwidth", "memory"):
        value = getattr(device, name)
        require(0 < value < math.inf, "kvcomp.plan: device", f"a {name} above 0", value)
    require_one_of(KINDS, "kvcomp.plan: kv", kv)
    expected = f"'model' for {model.name}, which caches latents"
    require(kv == "model" or model.value_dim is None, "kvcomp.plan: kv", expected, repr(kv))
    for method in methods:
        method.check(model.layers)
    plain = _Ledger(replace(model, kv="model"), device, Full(), prompt)
    model = replace(model, kv=kv)
    dense = _Ledger(model, device, Full(), prompt)
    ledgers = [dense, *(_Ledger(model, device, m, prompt) for m in methods if m != Full())]
    per_sequence = dense.read(context)
    weights, total = model.weights_read(batch), batch * per_sequence
    return Plan(
        model=model,
        device=device,
        context=context,
        batch=batch,
        prompt=prompt,
        generate=generate,
        weights_read=weights,
        kv_per_token=model.kv_per_token,
        kv_per_sequence=per_sequence,
        kv_total=total,
        kv_share=total / (total + weights),
        floor_ms=dense.seconds(context, batch) * 1e3,
        fits=dense.sequences(context) >= batch,
        rows=[_row(each, plain, context, batch, generate) for each in ledgers],
    )


def _row(own: _Ledger, plain: _Ledger, context: int, batch: int, generate: int | None) -> Row:
    model, device = own.model, own.device
    step, floor = own.step(context), plain.seconds(context, batch)
    kv_read, seconds = batch * own.read(context), own.seconds(context, batch)
    scored = seconds + batch * step.scoring / device.bandwidth
    fitting = own.sequences(context)
    rate = fitting / own.seconds(context, fitting) if fitting else 0.0
    flops = 2 * model.parameters * batch * step.encoded
    return Row(
        method=own.method.name,
        parameters=str(own.method),
        attended=step.read / model.kv_per_token,
        kv_read=kv_read,
        floor_ms=seconds * 1e3,
        speedup=floor / seconds,
        speedup_scored=floor / scored,
        kv_held=own.held(context),
        kv_host=step.host,
        sequences=fitting,
        longest=own.longest(batch),
        tokens_per_second=rate,
        link_bytes=batch * step.link,
        link_ms=device.link and batch * step.link / device.link * 1e3,
        encoded=step.encoded,
        encode_ms=device.flops and flops / device.flops * 1e3,
        speedup_generation=generate
        and plain.generation(generate, batch) / own.generation(generate, batch),
    )


@dataclass(frozen=True)
class _Ledger:
    """The bytes of a method on a device, at any context and batch."""

    model: Shape
    device: Device
    method: Method
    prompt: int

    def step(self, seen: float) -> StepBytes:
        return self.method.step_bytes(self.model.place(seen, self.prompt))

    def read(self, seen: float) -> float:
        """Bytes of K and V that a step reads, one sequence."""
        model = self.model
        managed = self.step(seen).read * (model.layers + model.shared) / model.layers
        return managed + model.sliding_bytes(seen, model.windows + model.shared_windows)

    def held(self, seen: float) -> float:
        """Bytes of K and V on the device, one sequence."""
        return self.step(seen).held + self.model.sliding_bytes(seen)

    def seconds(self, seen: float, batch: int) -> float:
        """Lower bound for the time of a step."""
        return (self.model.weights_read(batch) + batch * self.read(seen)) / self.device.bandwidth

    def generation(self, count: int, batch: int) -> float:
        """Lower bound for the time of a step, averaged over `count` tokens after the prompt."""
        middles = (self.prompt + count * (i + 0.5) / PIECES for i in range(PIECES))
        return sum(self.seconds(seen, batch) for seen in middles) / PIECES

    @property
    def room(self) -> float:
        """Bytes that the weights leave free."""
        return self.device.memory - self.model.weights

    def sequences(self, seen: int) -> int:
        return max(0, int(self.room // self.held(seen)))

    def longest(self, batch: int) -> int | None:
        """The longest context, in tokens, with which `batch` sequences fit; None: any."""
        short, long = 0, LONGEST
        if batch * self.held(long) <= self.room:
            return None
        while long - short > 1:  # what is held grows with what is seen
            middle = (short + long) // 2
            if batch * self.held(middle) <= self.room:
                short = middle
            else:
                long = middle
        return short
