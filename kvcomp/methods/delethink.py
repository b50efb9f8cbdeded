"""Delethink (arXiv 2510.06557): think in chunks and drop the context between them.

The first chunk answers the prompt q with up to C tokens. The next context consists of q, the first
h tokens of the output, which often hold the plan, and the last tokens of the output, the carry. It
continues in the middle of the same turn, and nothing tells the model that text is missing. All
later chunks do the same. The output contains newly generated tokens only, so the carry appears in
it once.

Context and KV are bounded by |q| + C for thoughts of any length. This costs one prefill of the
carry for every C - m tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from kvcomp.checks import require
from kvcomp.methods.base import Method
from kvcomp.methods.cost import Place, StepBytes

if TYPE_CHECKING:
    from typing_extensions import Self

VARIANTS = ("exact_bound", "paper")
RESETS = ("prefill", "streaming", "rotate")
SAMPLES = 16  # of a chunk, for its mean


class Chunk(NamedTuple):
    """One context: the prompt, output[:head] and output[carried:start]. It generates
    output[start:stop]."""

    head: int
    carried: int
    start: int
    stop: int


@dataclass(frozen=True)
class Delethink(Method, name="delethink"):
    """Chunked Markovian thinking.

    Attributes:
        chunk: C, tokens that the first chunk generates.
        carry: m, output tokens that the next context keeps; later chunks generate C - m.
        max_chunks: I, chunks after which `generate` ends; None: as many as `max_new_tokens` allows.
        head: h, first tokens of the output, which every context keeps.
        variant: "exact_bound": the head counts towards the carry, so a context never exceeds
            |q| + C (the published checkpoints were trained with it); "paper": the head comes on
            top, |q| + h + C (Algorithm 1).
        reset: how the next context gets its K and V. "prefill": prompt and head stay, the carry is
            encoded again. "streaming": the same, in pieces, while the previous chunk is still being
            decoded; two contexts are then in memory. "rotate": the carry keeps its K and V, and its
            keys are rotated to their new positions. This is an approximation: the kept states still
            carry information from deleted tokens.
        piece: g, tokens that "streaming" encodes at once.
        inner: the method that decides what attention reads and the cache keeps within a context;
            None: dense attention.
    """

    chunk: int = 8192  # C
    carry: int = 4096  # m
    max_chunks: int | None = 5  # I
    head: int = 100  # h
    variant: str = "exact_bound"
    reset: str = "prefill"
    piece: int = 128  # g
    inner: Method | None = None

    croppable = False
    one_way = "it forgets what lies before a chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of(VARIANTS, "variant")
        self._require_one_of(RESETS, "reset")
        self._require(self.carry >= 1, "carry", "at least 1 token")
        self._require(self.chunk > self.carry, "chunk", f"more than carry={self.carry} tokens")
        self._require(
            self.max_chunks is None or self.max_chunks >= 1, "max_chunks", "at least 1, or None"
        )
        self._require(self.piece >= 1, "piece", "at least 1 token")
        if self.variant == "paper":
            expected = f"fewer than chunk={self.chunk} tokens"
            self._require(0 <= self.head < self.chunk, "head", expected)
        else:
            self._require(
                0 <= self.head < self.carry,
                "head",
                f"fewer than carry={self.carry} tokens, which it counts towards in 'exact_bound'",
            )
        inner = self.inner
        self._require(
            inner is None or (isinstance(inner, Method) and not isinstance(inner, Delethink)),
            "inner",
            "another method, or None",
        )
        if self.reset == "rotate" and not self.attention.croppable:
            raise ValueError(
                f"kvcomp.Delethink: reset='rotate' needs all keys in place, but"
                f" {type(inner).__name__} drops some, or keeps them elsewhere; use 'prefill'"
            )

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """Chunks of three quarters of `budget`; the prompt has the other quarter."""
        chunk = (128 if budget is None else budget) * 3 // 4
        require(chunk >= 2, "kvcomp.Delethink: budget", "at least 3 tokens", budget)
        carry = chunk // 2
        return cls(chunk=chunk, carry=carry, head=carry // 4, max_chunks=None)

    @property
    def attention(self) -> Method:
        return _DENSE if self.inner is None else self.inner

    @property
    def drafts_refused(self) -> str | None:
        return self.attention.drafts_refused

    @property
    def moves_keys(self) -> bool:
        return self.reset == "rotate" or self.attention.moves_keys

    @property
    def tail(self) -> int:
        """m_t, the number of last output tokens in a new context."""
        return self.carry - self.head if self.variant == "exact_bound" else self.carry

    @property
    def budget(self) -> int | None:
        """Tokens that all chunks generate together, C + (I - 1)(C - m); None: no limit."""
        if self.max_chunks is None:
            return None
        return self.chunk + (self.max_chunks - 1) * (self.chunk - self.carry)

    @property
    def most_thought(self) -> int:
        """The largest number of output tokens in a context."""
        return self.chunk + (self.head if self.variant == "paper" else 0)

    def check(self, num_layers: int) -> None:
        self.attention.check(num_layers)

    def step_bytes(self, at: Place) -> StepBytes:
        """Bytes at that point of the first chunk; after it, the mean over a later chunk."""
        if at.seen - at.prompt < self.chunk:
            return self.attention.step_bytes(at)
        fresh, most = self.chunk - self.carry, at.prompt + self.most_thought
        begun = replace(at, prompt=most - fresh)
        steps = [
            self.attention.step_bytes(replace(begun, seen=most - fresh * (i + 0.5) / SAMPLES))
            for i in range(SAMPLES)
        ]
        full = self.attention.step_bytes(replace(begun, seen=most))
        held = full.held
        if self.reset == "streaming":  # the next context is there before this one has gone
            held += self.attention.step_bytes(replace(begun, seen=most - fresh)).held
        return StepBytes(
            read=sum(step.read for step in steps) / SAMPLES,
            held=held,
            scoring=sum(step.scoring for step in steps) / SAMPLES,
            link=sum(step.link for step in steps) / SAMPLES,
            host=full.host,
            encoded=0.0 if self.reset == "rotate" else self.tail / fresh,
        )

    def chunk_at(self, index: int) -> Chunk | None:
        """Chunk `index`, counted from 0; None after the last one.

        The carry is taken from the whole output and not from the last response, which is shorter
        than the carry if m > C / 2.
        """
        if self.max_chunks is not None and index >= self.max_chunks:
            return None
        if index == 0:
            return Chunk(0, 0, 0, self.chunk)
        fresh = self.chunk - self.carry
        start = self.chunk + (index - 1) * fresh
        return Chunk(self.head, start - self.tail, start, start + fresh)


_DENSE = Method()
