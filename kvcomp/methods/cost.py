"""The argument and the result of `Method.step_bytes`: bytes that one decode step moves and holds.

All bytes are for one sequence, summed over the layers that a method manages.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.cache.rows import EightBits


@dataclass(frozen=True)
class Place:
    """The position of a sequence, and the shape of the layers that a method manages.

    Attributes:
        seen: tokens of the sequence, including the newest.
        prompt: tokens of the prompt among them.
        layers: number of layers that the method manages.
        heads, kv_heads, head_dim: Hq, Hkv and D.
        itemsize: bytes of one value of K or V.
        value_dim: values of V of a token and KV head; None: head_dim. 0 in latent attention (MLA),
            where V is a part of K.
        coded: K and V are kept in eight bits; see `EightBits`.
    """

    seen: float
    prompt: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    value_dim: int | None = None
    coded: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        if self.coded:
            return EightBits.token_bytes(self.kv_heads, self.head_dim)
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        return self.kv_heads * (self.head_dim + value_dim) * self.itemsize

    @property
    def pool_bytes(self) -> int:
        """The same in host memory, where rows of codes are padded."""
        if self.coded:
            return EightBits.pool_bytes(self.kv_heads, self.head_dim)
        return self.token_bytes

    @property
    def logit_bytes(self) -> int:
        """Bytes to write and read the logits of one token in one layer, for all query heads. They
        have 16 bits with 16-bit K and V, as on a GPU (a CPU keeps fp32)."""
        return 2 * self.itemsize * self.heads


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one sequence.

    Attributes:
        read: K and V that attention reads in a step, averaged over the steps nearby.
        held: most K and V on the device, and digests of the K and V in host memory.
        scoring: bytes moved in a step to select tokens: logits, digests, page tables.
        link: K and V that come from host memory in a step if no selected token is resident yet.
        host: K and V in host memory.
        encoded: tokens (not bytes) encoded again per decoded token.
    """

    read: float
    held: float
    scoring: float = 0.0
    link: float = 0.0
    host: float = 0.0
    encoded: float = 0.0
