"""Before decoding: what a step must read, how fast that can be, what fits, and what a method can
give at most. From the shape of a model alone; nothing is run.

Decoding waits for memory. A step reads the weights once for all sequences, and the K and V that
attention asks for once per sequence; that many bytes over the bandwidth are a floor for its time.
The floor of dense attention over that of a method is the most that the method can give: no kernel
passes it, and what stays behind it is the kernel's own.

What a method reads and holds it says itself (`Method.step_bytes`), for the full-attention layers.
Sliding layers are counted with their window, for dense attention and methods alike; the states of
linear layers are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvcomp.methods import Full, Method
from kvcomp.methods.cost import Place, StepBytes

MEASURED = "measured: copy, read + write"
SHEET = 0.9  # of a data sheet's bandwidth: what a large copy reaches on an H200
LONGEST = 2**40  # tokens; a sequence that still fits then may be of any length
PIECES = 512  # of a generation, for its mean


@dataclass(frozen=True)
class Device:
    """What decoding runs on.

    Attributes:
        bandwidth: bytes per second that its memory delivers.
        memory: bytes for weights, K and V: all but what the runtime and activations take.
        link: bytes per second from pinned host memory; None: not known, or no link.
        flops: of matrix products in 16 bit, per second; None: not known.
        source: where the bandwidth is from.
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
    """A decoder, as far as bytes go.

    Attributes:
        name: for people.
        dtype: of weights, K and V.
        itemsize: bytes of one value of K or V.
        layers: full-attention layers, which a method manages.
        heads, kv_heads, head_dim: of an attention layer.
        parameters: that a token passes through.
        weights: bytes of all of them.
        fixed: bytes that every step reads: linear layers and LM head, but no routed expert.
        routed: bytes of all routed experts, `experts` in a layer, of which a token takes `active`.
        windows: tokens that each sliding layer keeps at most.
        linear: layers whose state does not grow.
        positions: that the model knows; None: no limit.
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
    linear: int = 0
    positions: int | None = None

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads.

        Of the experts those that some token takes: experts * (1 - (1 - active / experts)^tokens),
        as if they were taken evenly and independently.
        """
        idle = (1 - self.active / self.experts) ** tokens
        return self.fixed + self.routed * (1 - idle)

    @property
    def kv_per_token(self) -> int:
        """Bytes of K and V that a full sequence grows by with a token: full-attention layers."""
        return self.layers * self.place(1, 0).token_bytes

    def sliding_bytes(self, seen: float) -> float:
        """K and V of the sliding layers, one sequence."""
        return sum(min(seen, window) for window in self.windows) * self.place(1, 0).token_bytes

    def place(self, seen: float, prompt: int) -> Place:
        return Place(
            seen, prompt, self.layers, self.heads, self.kv_heads, self.head_dim, self.itemsize
        )


@dataclass(frozen=True)
class Row:
    """A method in its place.

    Attributes:
        method: its name, and `parameters` all of it.
        attended: tokens whose K and V a full-attention layer reads in a step, mean; with a copy
            for each query head, every copy counts.
        kv_read: bytes of K and V that a step reads, the whole batch, sliding layers included.
        floor_ms: least time of a step.
        speedup: most that the method can give over dense attention.
        speedup_scored: the same with what it moves to choose: logits, digests, page tables.
        kv_held: bytes of K and V on the device, one sequence.
        kv_host: the same in host memory.
        sequences: of this context that fit beside the weights.
        longest: context that fits with this batch; None: any.
        tokens_per_second: at most, with as many sequences as fit.
        link_bytes: from host memory in a step, at most, the whole batch; not in the floor.
        link_ms: time of that; None: the device's link is not known.
        encoded: tokens encoded anew for each decoded one; not in the floor.
        encode_ms: time of that in a step; None: the device's rate is not known.
        speedup_generation: most that it can give over a whole generation; None: not asked for.
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
    """Dense attention, and a row for it and every method that was asked for.

    Attributes:
        context: tokens of each of `batch` sequences, of which `prompt` are the prompt.
        generate: tokens of the generation that `speedup_generation` is about.
        weights_read: bytes in a step.
        kv_per_token, kv_per_sequence, kv_total: bytes of K and V as dense attention has them.
        kv_share: their share of what a step reads.
        floor_ms: least time of a step.
        fits: whether weights and K and V fit the device.
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
) -> Plan:
    """What a decode step at `context` tokens costs at least, by method.

    Args:
        methods: dense attention comes first in any case.
        context: tokens of a sequence, prompt and output.
        batch: sequences of that length.
        prompt: tokens of it that were there before decoding began.
        generate: also average over a generation of so many tokens behind the prompt.

    Raises:
        ValueError: a number out of its range, or a method whose parameters do not fit the model.
    """
    for name, value, least in (
        ("context", context, 1),
        ("batch", batch, 1),
        ("prompt", prompt, 0),
        ("generate", 1 if generate is None else generate, 1),
    ):
        if value < least:
            raise ValueError(f"kvcomp.plan: {name}: expected at least {least}, got {value}")
    if prompt >= context:
        raise ValueError(
            f"kvcomp.plan: prompt: expected fewer tokens than context={context}, got {prompt}"
        )
    for name in ("bandwidth", "memory"):
        if not 0 < getattr(device, name) < math.inf:
            raise ValueError(
                f"kvcomp.plan: device: expected a {name} above 0, got {getattr(device, name):g}"
            )
    for method in methods:
        method.check(model.layers)
    dense = _Ledger(model, device, Full(), prompt)
    ledgers = [dense, *(_Ledger(model, device, m, prompt) for m in methods if m != Full())]
    per_sequence = dense.read(context)
    weights, kv = model.weights_read(batch), batch * per_sequence
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
        kv_total=kv,
        kv_share=kv / (kv + weights),
        floor_ms=dense.seconds(context, batch) * 1e3,
        fits=dense.sequences(context) >= batch,
        rows=[_row(each, dense, context, batch, generate) for each in ledgers],
    )


def _row(own: _Ledger, dense: _Ledger, context: int, batch: int, generate: int | None) -> Row:
    model, device = own.model, own.device
    step, floor = own.step(context), dense.seconds(context, batch)
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
        and dense.generation(generate, batch) / own.generation(generate, batch),
    )


@dataclass(frozen=True)
class _Ledger:
    """A method's bytes on a device, at any context and batch."""

    model: Shape
    device: Device
    method: Method
    prompt: int

    def step(self, seen: float) -> StepBytes:
        return self.method.step_bytes(self.model.place(seen, self.prompt))

    def read(self, seen: float) -> float:
        """K and V of one sequence, in a step."""
        return self.step(seen).read + self.model.sliding_bytes(seen)

    def held(self, seen: float) -> float:
        """K and V of one sequence, on the device."""
        return self.step(seen).held + self.model.sliding_bytes(seen)

    def seconds(self, seen: float, batch: int) -> float:
        """Least time of a step."""
        return (self.model.weights_read(batch) + batch * self.read(seen)) / self.device.bandwidth

    def generation(self, count: int, batch: int) -> float:
        """Least time of a step, mean over `count` tokens behind the prompt."""
        middles = (self.prompt + count * (i + 0.5) / PIECES for i in range(PIECES))
        return sum(self.seconds(seen, batch) for seen in middles) / PIECES

    @property
    def room(self) -> float:
        """Bytes beside the weights."""
        return self.device.memory - self.model.weights

    def sequences(self, seen: int) -> int:
        return max(0, int(self.room // self.held(seen)))

    def longest(self, batch: int) -> int | None:
        """Tokens of a sequence of which `batch` fit; None: there is no end."""
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
