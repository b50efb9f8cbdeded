"""How large a method may be: the parameters with which a sequence holds at most so many bytes.

What counts is what a run's report counts on the device: K and V in use, and whatever the method
remembers beside them. `Method.step_bytes` knows the first; the second depends on the method's own
notes, so a method is tried on random keys and made smaller until both fit. Methods that keep all of
K and V have no such size: their bound is on the tokens that their sparse layers attend to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import singledispatch
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from harness.kv import eight_bits
from kvcomp import METHODS, Delethink, Method
from kvcomp.cache import KVCache
from kvcomp.methods.cost import Place
from kvcomp.methods.eviction import Eviction
from kvcomp.methods.retrieval import Retrieval

SHORT = 4096  # tokens of a context up to which methods are as in `Method.example`
PAGE = 4  # tokens, of the examples that have pages
ROUNDS = 64  # different q, K and V, taken in turn
TRIALS = 12


@dataclass(frozen=True)
class Room:
    """The model, and the longest context that the study makes of it."""

    model: str
    place: Place
    dtype: torch.dtype
    device: torch.device

    @property
    def context_bytes(self) -> int:
        """K and V of one sequence in all layers at the end."""
        return int(Method().step_bytes(self.place).held)

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return self.place.layers * self.place.token_bytes

    def keeping(self, kv: str) -> Room:
        """The same with K and V kept as `kv` says, one of `kvcomp.cache.rows.KINDS`."""
        return replace(self, place=replace(self.place, coded=kv != "model"))


def fit(name: str, bound: int, room: Room, own: dict[str, Any]) -> Method:
    """The method `name` with at most `bound` bytes for a sequence, if it drops any.

    Args:
        own: fields that the user has set.

    Raises:
        ValueError: the method cannot work with so little; the message says why.
    """
    tokens, tried = bound // room.token_bytes, []
    for _ in range(TRIALS):
        if tokens < 1 or (len(tried) > 1 and tried[-1] >= tried[-2]):  # no smaller than before
            break
        method = begin(name, tokens, room, own)
        if keeps_all(method):
            return method
        held = held_bytes(method, room)
        if held <= bound:
            return method
        tried.append(held)
        whole = getattr(method, "dense_layers", 0)
        sparse = (room.place.layers - whole) * room.place.token_bytes
        tokens -= -((bound - held) // sparse)
    smallest = f"; {min(tried)} when last tried" if tried else ""
    raise ValueError(f"{name}: cannot hold {bound} bytes a sequence or fewer{smallest}")


def begin(name: str, tokens: int, room: Room, own: dict[str, Any]) -> Method:
    """The method with room for `tokens` on the device, what it remembers about them not counted."""
    cls = METHODS[name]
    short = room.place.seen <= SHORT
    method = cls.example(tokens - tokens % PAGE) if short else cls.for_model(room.model)
    return with_tokens(method, tokens, room.place, own)


def keeps_all(method: Method) -> bool:
    """Whether all K and V stay on the device: the bound is then on what sparse layers attend to."""
    return not isinstance(method, (Eviction, Retrieval, Delethink))


@singledispatch
def with_tokens(method: Method, tokens: int, place: Place, own: dict[str, Any]) -> Method:
    """`method` with room for `tokens`, and the fields that the user set. Here the budget of a
    sparse layer, in whole pages, where there is one."""
    known = {field.name for field in fields(method)}
    page = {"page_size": 1, **vars(method), **own}["page_size"]
    budget = {"budget": tokens - tokens % page} if "budget" in known else {}
    return replace(method, **{**budget, **own})


@with_tokens.register
def _(method: Eviction, tokens: int, place: Place, own: dict[str, Any]) -> Method:
    """The budget stays after an eviction, and a window comes before the next one."""
    window = own.get("window", method.window)
    return replace(method, **{"budget": tokens - window, **own})


@with_tokens.register
def _(method: Retrieval, tokens: int, place: Place, own: dict[str, Any]) -> Method:
    """What is retrieved, beside sinks, local tokens and the open segment."""
    method = replace(method, **own)
    return replace(method, budget=method.budget + tokens - method.most_resident)


@with_tokens.register
def _(method: Delethink, tokens: int, place: Place, own: dict[str, Any]) -> Method:
    """The prompt and a chunk, of which a half is carried on."""
    chunk = tokens - place.prompt
    if chunk < 2:
        raise ValueError(f"delethink: a prompt of {place.prompt} tokens fills the {tokens}")
    carry = chunk // 2
    sizes = {"chunk": chunk, "carry": carry, "head": min(100, carry // 4), "max_chunks": None}
    return replace(method, **sizes | own)


def held_bytes(method: Method, room: Room) -> int:
    """Most bytes on the device for one sequence: K and V, and the method's notes."""
    place = room.place
    if isinstance(method, Delethink) and method.inner is None:
        return int(method.step_bytes(place).held)
    whole = getattr(method, "dense_layers", 0)
    method = replace(method, dense_layers=0) if whole else method
    sparse = (place.layers - whole) * _rehearsed(method, room)
    return int(whole * place.seen * place.token_bytes + sparse)


@torch.no_grad()
def _rehearsed(method: Method, room: Room) -> int:
    """The bytes of one layer, counted while it decodes random q, K and V."""
    place = room.place
    generator = torch.Generator(room.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(1, *shape, generator=generator, device=room.device)
        return x.to(room.dtype)

    prompt = random(place.heads, place.prompt, place.head_dim)
    steps = [
        (random(place.heads, place.head_dim), random(place.kv_heads, 1, place.head_dim))
        for _ in range(ROUNDS)
    ]
    inv_freq = 1e4 ** (-torch.arange(0, place.head_dim, 2, device=room.device) / place.head_dim)
    coded = eight_bits("int8" if place.coded else "model", place.head_dim)
    cache = KVCache(method, 1, inv_freq=inv_freq, eight_bits=coded)
    layer, scale = cache.layers[0], place.head_dim**-0.5
    layer.append(prompt[:, : place.kv_heads], prompt[:, : place.kv_heads])
    cache.prefill(layer, prompt, scale)
    for q, k in islice(cycle(steps), int(place.seen) - place.prompt):
        layer.append(k, k)
        cache.attend(layer, q, scale)
    kept = cache.meter.peak_bytes
    if isinstance(method, Retrieval):  # where queries do not turn, more tokens stay local than here
        kept = max(kept, min(method.most_resident, int(place.seen)) * place.token_bytes)
    return kept + cache.meter.peak_note_bytes
