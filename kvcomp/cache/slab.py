"""Slab: the memory of one layer's keys and values, which grows in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.cache.later import forget, known, later
from kvcomp.cache.rows import WORDS, EightBits, Rows

GROWTH = 1.5  # a full slab is replaced by one this many times larger
FIRST_CAPACITY = 256  # tokens
TOKEN_ROW = 2048  # bytes of a token, all KV heads, from which on they are better read as one


class Slab:
    """K and V of one layer: [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv], and what is noted
    about each token in them.

    Attributes:
        max_len: slots that may be in use: an upper bound of the rows' lengths, known on the host.
        slots: what a method remembers about each kept token: [B, U, capacity] of 4-byte elements
            (`track`), moved with the tokens, 0 where no token is.
        shared_sets: whether all KV heads mostly attend to the same few tokens, as a method may say
            at its start. On a CPU the heads of a token then lie side by side, where they fill
            `TOKEN_ROW` bytes: one read where there would be a short one for each head.
        token_bytes: bytes of K and V of one token as the model hands it in, all KV heads.
        slot_bytes: bytes of K and V of one token as it is kept (see `repeat_heads`).
        note_bytes: bytes of what `slots` says about one token.
    """

    eight_bits: EightBits | None = None  # how K and V are kept; None: as the model makes them
    _dtype: torch.dtype = later("the first append")  # of K and V as the model makes them
    _k: Tensor = later("the first append")
    _v: Tensor = later("the first append")

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        forget(self, "_k", "_v", "_dtype")
        self.max_len = 0
        self.slots: dict[str, Tensor] = {}
        self.shared_sets = False
        self.token_bytes = self.slot_bytes = 0
        self._most: tuple[int, int] | None = None  # (budget, window) of `limit`
        self._accepted: tuple | None = None  # what the latest tokens were like that `_check` let in
        self._copies = 1  # of each KV head, see `repeat_heads`

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, max_len, D]; row b is valid up to seq_lens[b]. Of eight bits, a copy."""
        if self.eight_bits is not None:
            return self.decoded(self.stored())[0]
        return self._k[:, :, : self.max_len]

    @property
    def values(self) -> Tensor:
        """[B, Hkv, max_len, D]; row b is valid up to seq_lens[b]. Of eight bits, a copy."""
        if self.eight_bits is not None:
            return self.decoded(self.stored())[1]
        return self._v[:, :, : self.max_len]

    def stored(self, end: int | None = None) -> Rows:
        """What lies in slots [0, end), as ops take it; None: `max_len`."""
        end = self.max_len if end is None else end
        words = None if self.eight_bits is None else self.slots[WORDS]
        if end == self._k.shape[2]:
            return Rows(self._k, self._v, words)
        words = None if words is None else words[:, :, :end]
        return Rows(self._k[:, :, :end], self._v[:, :, :end], words)

    def query(self, q: Tensor) -> Tensor:
        """q [..., D] as what is stored wants it."""
        return q if self.eight_bits is None else self.eight_bits.query(q)

    def decoded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """K and V [..., n, D] as the model makes them."""
        if self.eight_bits is None:
            return rows.k, rows.v
        return self.eight_bits.decode(rows, self._dtype)

    def _encoded(self, k: Tensor, v: Tensor) -> Rows:
        """New tokens [B, Hkv, n, D] as the slab keeps them."""
        if self._copies > 1:
            k, v = (x.repeat_interleave(self._copies, 1) for x in (k, v))
        return Rows(k, v) if self.eight_bits is None else self.eight_bits.encode(k, v)

    @property
    def allocated(self) -> bool:
        """Whether there is memory: from the first `append` on."""
        return known(self, "_k")

    @property
    def capacity(self) -> int:
        return self._k.shape[2] if self.allocated else 0

    @property
    def kv_heads(self) -> int:
        """Hkv, or Hq after `repeat_heads`."""
        return self._k.shape[1]

    @property
    def head_dim(self) -> int:
        return self._k.shape[3]

    @property
    def note_bytes(self) -> int:
        noted = (tensor for name, tensor in self.slots.items() if name != WORDS)
        return sum(tensor.shape[1] * tensor.element_size() for tensor in noted)

    def limit(self, budget: int, window: int) -> None:
        """At most `budget` tokens stay after an eviction, and `window` arrive before the next.

        The slab then has room for just that. A longer prompt has it until the first eviction.
        """
        self._most = budget, window

    def repeat_heads(self, heads: int) -> None:
        """Keep a copy of K and V for each of `heads` query heads, as sets per query head need.

        That multiplies the bytes by heads / Hkv; later appends are repeated alike.
        """
        self._copies = heads // self._k.shape[1]
        self._k, self._v = (x.repeat_interleave(self._copies, 1) for x in (self._k, self._v))
        if self.eight_bits is not None:
            self.slots[WORDS] = self.slots[WORDS].repeat_interleave(self._copies, 1)
        self._count_bytes()

    def _count_bytes(self) -> None:
        """What one token takes, from what the slab is made of."""
        _, heads, _, dim = self._k.shape
        both = dim + self._v.shape[3]
        self.token_bytes = heads // self._copies * both * self._dtype.itemsize
        self.slot_bytes = self.token_bytes * self._copies
        if self.eight_bits is not None:
            self.slot_bytes = self.eight_bits.token_bytes(heads, dim)

    def track(self, name: str, units: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Add `slots[name]` [B, units, capacity] of zeros."""
        batch, _, capacity, _ = self._k.shape
        self.slots[name] = self._k.new_zeros(batch, units, capacity, dtype=dtype)
        return self.slots[name]

    def _reserve(self, like: Rows, length: int) -> None:
        """Room for `length` tokens; `like` [B, H, n, ...] are those that come, as they are kept."""
        if length <= self.capacity:
            return
        capacity = max(length, FIRST_CAPACITY, int(self.capacity * GROWTH))
        if self._most is not None:
            budget, window = self._most
            if capacity >= budget:  # all that comes before the next eviction
                step = like.k.shape[2] == 1  # one of the window; after a prompt, all of it follows
                capacity = max(length, budget + window) if step else max(length, budget) + window
        if not self.allocated:
            self._k, self._v = like.k[:, :, :0], like.v[:, :, :0]
            if self.eight_bits is not None:
                self.track(WORDS, like.k.shape[1])
        self._resize(capacity)

    def _shrink(self, longest: int) -> None:
        """No row has more than `longest` tokens now: memory too large for that goes back."""
        self.max_len = min(self.max_len, longest)
        if self._most is not None and self.max_len <= self._most[0] < self.capacity - self._most[1]:
            self._resize(sum(self._most))

    def _gather(self, slots: Tensor) -> None:
        """Only the tokens in `slots` [B, M] stay, in that order, in memory for no more."""
        index = slots[:, None, :, None]
        capacity = max(slots.shape[1], FIRST_CAPACITY)
        self._k, self._v = (
            _padded(torch.take_along_dim(x, index, 2), capacity) for x in (self._k, self._v)
        )
        self.slots = {
            name: _padded(torch.take_along_dim(x, slots[:, None], 2), capacity)
            for name, x in self.slots.items()
        }

    def _resize(self, capacity: int) -> None:
        """Move the kept tokens and what `slots` says about them to memory of another size."""

        def moved(old: Tensor, by_token: bool = False) -> Tensor:
            return _padded(old[:, :, : min(old.shape[2], self.max_len)], capacity, by_token)

        _, heads, _, dim = self._k.shape
        row = heads * min(dim, self._v.shape[3]) * self._k.element_size()
        by_token = self.shared_sets and self._k.is_cpu and row >= TOKEN_ROW
        self._k = moved(self._k, by_token)
        self._v = moved(self._v, by_token)
        self.slots = {name: moved(tensor) for name, tensor in self.slots.items()}

    def _as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a model hands in as this slab keeps it."""
        return k, v

    def _check(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Raise ValueError for new tokens that do not fit those before, or each other."""
        tokens = None
        if valid is None and not torch.compiler.is_compiling():
            tokens = k.shape, v.shape, k.dtype, v.dtype, k.device
            if tokens == self._accepted:
                return
        if k.ndim != 4 or v.shape[:-1] != k.shape[:-1] or 0 in k.shape:
            raise ValueError(
                "kvcomp: append: expected k and v [B, Hkv, n, D] of the same B, Hkv and n, none of"
                f" them 0, got {list(k.shape)} and {list(v.shape)}"
            )
        if valid is not None and valid.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"kvcomp: append: argument 'valid': expected [{k.shape[0]}, {k.shape[2]}],"
                f" got {list(valid.shape)}"
            )
        if k.dtype != v.dtype:
            raise ValueError(
                f"kvcomp: append: dtype: expected k and v of one, got {k.dtype} and {v.dtype}"
            )
        if not self.allocated:
            return
        batch, heads, _, dim = self._k.shape
        had = batch, heads // self._copies, dim, self._v.shape[3], self._dtype, self._k.device
        got = k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device
        if had == got:
            if tokens is not None:
                self._accepted = tokens
            return
        names = "batch size", "KV heads", "head size", "head size of V", "dtype", "device"
        for what, old, new in zip(names, had, got, strict=True):
            if old != new:
                raise ValueError(f"kvcomp: append: {what}: the cache has {old}, got {new}")


def _padded(x: Tensor, capacity: int, by_token: bool = False) -> Tensor:
    """[B, U, n, ...] -> [B, U, capacity, ...], a copy; in memory by token [B, capacity, U, ...]."""
    batch, units, _, *rest = x.shape
    # Zeros, because a mask does not stop the NaN that memory never written may hold.
    if by_token:
        new = x.new_zeros(batch, capacity, units, *rest).transpose(1, 2)
    else:
        new = x.new_zeros(batch, units, capacity, *rest)
    new[:, :, : x.shape[2]] = x
    return new
