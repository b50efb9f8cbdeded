"""What one decode step moves and holds, by formula: what `Method.step_bytes` is asked and answers.

Bytes of one sequence, in all of the layers that a method manages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The position of a sequence, and the shape of the layers that a method manages.

    Attributes:
        seen: tokens of the sequence, including the newest.
        prompt: tokens of the prompt among them.
        layers: number of layers that the method manages.
        heads, kv_heads, head_dim: Hq, Hkv and D.
        itemsize: bytes of one value of K or V.
    """

    seen: float
    prompt: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def logit_bytes(self) -> int:
        """The logits of one token in one layer, for every query head, written and read: in 16 bits
        beside 16-bit K and V, as on a GPU (a CPU keeps fp32)."""
        return 2 * self.itemsize * self.heads


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one sequence.

    Attributes:
        read: K and V that attention reads in a step, averaged over the steps nearby.
        held: most K and V on the device, including digests of those that are not.
        scoring: moved in a step in order to select: logits, digests, page tables.
        link: K and V from host memory in a step, if no selected token is resident yet.
        host: K and V in host memory.
        encoded: tokens (not bytes) encoded again per decoded token.
    """

    read: float
    held: float
    scoring: float = 0.0
    link: float = 0.0
    host: float = 0.0
    encoded: float = 0.0
