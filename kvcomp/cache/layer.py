"""LayerCache: the keys and values of one layer, in a slab that grows in place.

Two lengths matter. The *logical* length is what the model has seen: positions, masks and
`get_seq_length` are about it. The *physical* length is what is kept: kernels see only that. Pad
tokens never enter the slab, so the rows of a batch are ragged, and no kernel ever sees padding.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvcomp.cache.host_pool import HostPool
    from kvcomp.cache.kv_cache import KVCache
    from kvcomp.cache.unit_index import UnitIndex

GROWTH = 1.5  # a full slab is replaced by one this many times larger
FIRST_CAPACITY = 256  # tokens
TOKEN_ROW = 2048  # bytes of a token, all KV heads, from which on they are better read as one


class LayerCache:
    """K and V of one layer: [B, Hkv, capacity, D] each, allocated at the first `append`.

    Attributes:
        position: this layer's place among the layers that the method manages, from 0.
        seq_lens: [B] int32, physical length of each row.
        logical_lens: [B] int32, tokens each row has seen, padding not counted.
        max_len: upper bound of `seq_lens`, known on the host without reading the device.
        columns: tokens seen counted as columns of the batch, padding included.
        first: whether the last `append` brought the first columns.
        state: what a method remembers about the rows of this layer; each tensor is [B, ...] and
            follows the rows through `select`.
        shared_sets: whether all KV heads mostly attend to the same few tokens, as a method may say
            at its start. On a CPU the heads of a token then lie side by side, where they fill
            `TOKEN_ROW` bytes: one read where there would be a short one for each head.
        scale: of the logits, known from the first prompt on.
        added: tokens that each row gained by the last `append`, a number or [B] int32.
        pool: all of the tokens in host memory, for methods that retrieve.
        index: the units in which they retrieve them.
        pending: waits for work in the background on this layer's pool and index; None: there is
            none (see `settle`).
        slots: what a method remembers about each kept token: [B, U, capacity] of 4-byte elements
            (`track`), moved with the tokens, 0 where no token is.
        token_bytes: bytes of K and V of one token as the model hands it in, all KV heads.
        slot_bytes: bytes of K and V of one token as it is kept (see `repeat_heads`).
        note_bytes: bytes of what `slots` says about one token.
    """

    def __init__(self, cache: KVCache, position: int) -> None:
        self.own(cache)
        self.position = position
        self.reset()

    def own(self, cache: KVCache) -> None:
        """This is a layer of `cache` now: without keeping it alive, so that a cache that nobody
        holds gives its memory back at once, and not when Python looks for cycles."""
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> KVCache:
        cache = self._cache()
        if cache is None:
            raise ReferenceError("kvcomp: the cache of this layer is gone; keep a reference to it")
        return cache

    def __getstate__(self) -> dict:
        """For copies: work in the background belongs to this layer, and not to its copy."""
        self.settle()
        return self.__dict__

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self.seq_lens: Tensor | None = None
        self.logical_lens: Tensor | None = None
        self.token_bytes = self.slot_bytes = 0
        self.max_len = 0
        self.columns = 0
        self.first = True
        self.shared_sets = False
        self.scale = 1.0
        self.added: int | Tensor = 0
        self.state: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}
        self.pool: HostPool | None = None
        self.index: UnitIndex | None = None
        self.pending: Callable[[], None] | None = None
        self._placed: Tensor | None = None  # [B] logical lengths when positions were last written
        self._placed_columns = 0
        self._most: tuple[int, int] | None = None  # (budget, window) of `limit`
        self._whole = True  # nothing has been evicted
        self._copies = 1  # of each KV head, see `repeat_heads`
        self._uniform = True  # every row has max_len tokens: an append is one slice copy
        self._arrivals: list[tuple[int, Tensor | None]] = []  # (columns, [B, columns] validity)

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, max_len, D]; row b is valid up to seq_lens[b]."""
        return self._k[:, :, : self.max_len]

    @property
    def values(self) -> Tensor:
        """[B, Hkv, max_len, D]; row b is valid up to seq_lens[b]."""
        return self._v[:, :, : self.max_len]

    @property
    def capacity(self) -> int:
        return 0 if self._k is None else self._k.shape[2]

    @property
    def note_bytes(self) -> int:
        return sum(tensor.shape[1] * tensor.element_size() for tensor in self.slots.values())

    def limit(self, budget: int, window: int) -> None:
        """At most `budget` tokens stay after an eviction, and `window` arrive before the next.

        The slab then has room for just that. A longer prompt has it until the first eviction.
        """
        self._most = budget, window

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Add n tokens to every row.

        Args:
            k, v: [B, Hkv, n, D].
            valid: [B, n] bool, False for padding, which is seen but not kept; None: all valid.

        Raises:
            ValueError: another batch size, head count, head size, dtype or device than before.
        """
        self._check(k, v, valid)
        k, v = k.detach(), v.detach()
        if self._copies > 1:
            k, v = (x.repeat_interleave(self._copies, 1) for x in (k, v))
        valid = None if valid is None else valid.to(k.device)
        batch, _, count, _ = k.shape
        if self.seq_lens is None:
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=k.device)
            self.logical_lens = self.seq_lens.clone()
            self.token_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
            self.slot_bytes = self.token_bytes
        self._reserve(k, self.max_len + count)
        if valid is None and self._uniform:
            self._k[:, :, self.max_len : self.max_len + count] = k
            self._v[:, :, self.max_len : self.max_len + count] = v
            added = count
        else:
            added = self._scatter(k, v, valid)
        self.seq_lens += added
        self.logical_lens += added
        self.added = added
        self.first = not self.columns
        self.max_len += count
        self.columns += count
        self._arrivals.append((count, valid))
        if len(self._arrivals) > 1 and valid is None and self._arrivals[-2][1] is None:
            self._arrivals[-2:] = [(self._arrivals[-2][0] + count, None)]

    def attend(
        self,
        q: Tensor,
        scale: float,
        *,
        page_ids: Tensor | None = None,
        page_size: int = 1,
        seq_lens: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`decode_attention` over this layer, counted: the only door between methods and kernel.

        Returns:
            out [B, Hq, D] and lse [B, Hq].
        """
        lens = self.seq_lens if seq_lens is None else seq_lens
        self.cache.meter.attended(self.position, lens)
        return ops.decode_attention(
            q,
            self.keys,
            self.values,
            lens,
            page_ids=page_ids,
            page_size=page_size,
            scale=scale,
            logits=logits,
        )

    def attend_and_select(self, q: Tensor, scale: float, **selection: Any) -> tuple[Tensor, ...]:
        """`attend_and_select` over this layer, counted; `selection` is passed on.

        Returns:
            out [B, Hq, D], lse [B, Hq], scores, selected_ids and selected_lens.
        """
        self.cache.meter.attended(self.position, self.seq_lens)
        keys, values = self.keys, self.values
        return ops.attend_and_select(q, keys, values, self.seq_lens, scale=scale, **selection)

    def repeat_heads(self, heads: int) -> None:
        """Keep a copy of K and V for each of `heads` query heads, as sets per query head need.

        That multiplies the bytes by heads / Hkv; later appends are repeated alike.
        """
        self._copies = heads // self._k.shape[1]
        self._k, self._v = (x.repeat_interleave(self._copies, 1) for x in (self._k, self._v))
        self.slot_bytes = self.token_bytes * self._copies

    def track(self, name: str, units: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Add `slots[name]` [B, units, capacity] of zeros."""
        batch, _, capacity, _ = self._k.shape
        self.slots[name] = self._k.new_zeros(batch, units, capacity, dtype=dtype)
        return self.slots[name]

    def remember(self, name: str, note: Tensor) -> Tensor:
        """Set `state[name]` to a note that decode steps change in place."""
        self.state[name] = note
        return note

    def positions(self, units: int) -> Tensor:
        """[B, units, max_len] int32: the place of every kept token among those its row has seen.

        Tokens are appended in order, so this is written when it is asked for, not at every step.
        """
        if "position" not in self.slots:
            self.track("position", units)
            self._placed, self._placed_columns = torch.zeros_like(self.logical_lens), 0
        table = self.slots["position"][..., : self.max_len]
        new_columns = self.columns - self._placed_columns
        if not new_columns:
            return table
        if self._uniform:  # the new tokens are the last columns
            count = min(new_columns, self.max_len)
            age = torch.arange(count, 0, -1, dtype=torch.int32, device=table.device)
            table[..., self.max_len - count :] = (self.logical_lens[:, None] - age)[:, None]
        else:
            slot = torch.arange(self.max_len, dtype=torch.int32, device=table.device)
            age = self.seq_lens[:, None] - slot  # [B, slots], the newest is 1
            fresh = age <= (self.logical_lens - self._placed)[:, None]
            position = self.logical_lens[:, None] - age
            table.copy_(torch.where(fresh[:, None], position[:, None], table))
        self._placed, self._placed_columns = self.logical_lens.clone(), self.columns
        return table

    def evict(self, victims: Tensor, kept_lens: Tensor, shortest: int, longest: int) -> None:
        """Take tokens out, in place, and give memory back that is no longer needed.

        Args:
            victims: [B, U, V] int32 slots, ascending, then -1, as `ops.select_victims` returns.
            kept_lens: [B] int32: tokens that rows longer than that keep.
            shortest, longest: bounds of `kept_lens`, known on the host.
        """
        self.cache.meter.evicting(self, kept_lens)
        ops.compact_kv(self._k, self._v, list(self.slots.values()), victims, self.seq_lens)
        torch.minimum(self.seq_lens, kept_lens, out=self.seq_lens)
        slot = torch.arange(shortest, self.max_len, device=self.seq_lens.device)
        free = slot >= self.seq_lens[:, None, None]
        for tensor in self.slots.values():
            tensor[..., shortest : self.max_len].masked_fill_(free, 0)
        self._whole = False
        self._shrink(longest)

    def _shrink(self, longest: int) -> None:
        """No row has more than `longest` tokens now: memory too large for that goes back."""
        self.max_len = min(self.max_len, longest)
        if self._most is not None and self.max_len <= self._most[0] < self.capacity - self._most[1]:
            self._resize(sum(self._most))

    def keep(self, slots: Tensor, lens: Tensor) -> None:
        """Only the listed tokens stay, in that order; memory that is no longer needed goes back.

        Args:
            slots: [B, M] int64; row b's first lens[b] count.
            lens: [B] int32.
        """
        index = slots[:, None, :, None]
        capacity = max(slots.shape[1], FIRST_CAPACITY)
        self._k, self._v = (
            _padded(torch.take_along_dim(x, index, 2), capacity) for x in (self._k, self._v)
        )
        self.slots = {
            name: _padded(torch.take_along_dim(x, slots[:, None], 2), capacity)
            for name, x in self.slots.items()
        }
        self.seq_lens, self.max_len = lens, slots.shape[1]
        self._whole = False
        self._recount(slots.shape[1])

    def exchange(
        self, rows: Tensor, first_local: Tensor, active: Tensor, num_sinks: int, most: int
    ) -> Tensor:
        """Hold the pool rows that are wanted, see `ops.fetch_rows`; `positions` tells the rows.

        Args:
            rows: [B, Hkv, K] int32, as `ops.select_units` returns them.
            first_local, active: [B] int32.
            num_sinks: pool rows below that always stay.
            most: tokens a row has at most afterwards, known on the host.

        Returns:
            fetched [B, Hkv] int32: rows that came over the link.
        """
        self.positions(self._k.shape[1])  # brings them up to date
        most = min(most, self.columns)
        self._reserve(self._k[:, :, :1], most)
        fetched = ops.fetch_rows(
            self._k,
            self._v,
            self.slots["position"],
            self.seq_lens,
            rows,
            first_local,
            active,
            self.pool.blocks,
            num_sinks=num_sinks,
        )
        self._recount(most)
        return fetched

    def settle(self) -> None:
        """Wait for what the background still does to this layer."""
        if self.pending is not None:
            self.pending()  # what it raises is raised whenever this layer is asked for
            self.pending = None

    def crop(self, count: int) -> None:
        """Take back the last `count` columns exactly, as if they had never been appended.

        Raises:
            ValueError: more columns than were seen, or tokens have left the cache since.
        """
        if count > self.columns:
            raise ValueError(
                f"kvcomp: crop of {count} tokens, but this layer has seen {self.columns}"
            )
        if not self._whole:
            raise ValueError(f"kvcomp: crop of {count} tokens, but tokens have been evicted")
        removed = self._take_back(count)
        if self.seq_lens is not None:
            self.seq_lens -= removed
            self.max_len = int(self.seq_lens.max())

    def adopt(self, other: LayerCache, columns: int, room: int) -> None:
        """From empty, become a copy of the first `columns` columns of `other`; see `KVCache`."""
        other._require_whole("adopt")
        pieces = other._pieces(0, columns)
        masked = any(valid is not None for _, valid in pieces)
        lens = sum(n if valid is None else valid.sum(1).int() for n, valid in pieces)
        longest = int(lens.max()) if masked else lens
        slot = torch.arange(longest, device=other.seq_lens.device)
        self._reserve(other._k, room)
        valid = slot < lens[:, None] if masked else None
        self.append(other._k[:, :, :longest], other._v[:, :, :longest], valid)
        self.columns, self.scale, self._arrivals = columns, other.scale, pieces

    def recede(self, columns: int, kept: int) -> None:
        """Back to the first `columns` columns: all are in the pool, the first `kept` rows here."""
        self.settle()
        self._take_back(self.columns - columns)
        self.seq_lens.fill_(kept)
        for tensor in self.slots.values():
            tensor[..., kept:] = 0
        self._placed, self._placed_columns = self.logical_lens.clone(), columns
        self._recount(kept)

    def fold(self, first: int, last: int, inv_freq: Tensor) -> None:
        """Take columns [first, last), of which none is padding, out of the middle.

        The tokens behind them keep their K and V; their keys are rotated to where they are now.

        Args:
            first, last: where last < first, columns [last, first) are there twice afterwards.
            inv_freq: [R / 2] fp32, see `ops.rotate_keys`.

        Raises:
            ValueError: tokens have been evicted, so that columns are not slots.
        """
        self._require_whole("fold")
        count, moved = last - first, self.columns - last
        self._reserve(self._k[:, :, :1], self.max_len - count)  # where pieces overlap
        step = torch.arange(moved, device=self.seq_lens.device)
        old = (self.seq_lens.long() - moved)[:, None] + step  # [B, moved] slots
        rows = torch.arange(len(old), device=old.device)[:, None]
        k = self._k[rows, :, old].transpose(1, 2)  # [B, Hkv, moved, D], a copy
        ops.rotate_keys(k, torch.full_like(self.seq_lens, -count), inv_freq)
        self._k[rows, :, old - count] = k.transpose(1, 2)
        self._v[rows, :, old - count] = self._v[rows, :, old]
        self._arrivals = self._pieces(0, first) + self._pieces(last, self.columns)
        self.columns -= count
        self.seq_lens -= count
        self.logical_lens -= count
        self.max_len -= count

    def seen(self) -> Tensor:
        """[B, columns] bool: which of the columns were tokens, and not padding."""
        rows = self.seq_lens.new_ones(self.seq_lens.shape[0], 1, dtype=torch.bool)
        pieces = [rows.expand(-1, n) if valid is None else valid for n, valid in self._arrivals]
        return torch.cat(pieces, 1)

    def shows(self, mask: Tensor) -> bool:
        """Whether mask [B, columns] bool shows what has been seen, no more and no less."""
        return torch.equal(mask, self.seen().to(mask.device))

    def select(self, rows: Tensor) -> None:
        """Rows become `rows` ([B'] int64 indices): reorder, repeat or drop sequences."""
        if self._k is None:
            return
        self.settle()
        rows = rows.to(self._k.device)
        for part in (self.pool, self.index):
            if part is not None:
                part.select(rows)
        if any(valid is not None for _, valid in self._arrivals):
            self._arrivals = [(self.columns, self.seen())]  # one piece to reorder, not one per step
        self._k, self._v = self._k[rows], self._v[rows]
        self.seq_lens, self.logical_lens = self.seq_lens[rows], self.logical_lens[rows]
        self.state = {name: tensor[rows] for name, tensor in self.state.items()}
        self.slots = {name: tensor[rows] for name, tensor in self.slots.items()}
        if self._placed is not None:
            self._placed = self._placed[rows]
        self._arrivals = [(n, None if v is None else v[rows]) for n, v in self._arrivals]

    def _require_whole(self, what: str) -> None:
        if not self._whole or self.slots or self.state or self.pool or self._copies > 1:
            raise ValueError(
                f"kvcomp: {what}: expected a layer that keeps every token and nothing besides"
            )

    def _take_back(self, count: int) -> Tensor | int:
        """The last `count` columns were never seen; how many tokens of each row they held."""
        kept = self._pieces(0, self.columns - count)
        gone = self._pieces(self.columns - count, self.columns)
        self._arrivals, self.columns = kept, self.columns - count
        removed = sum(n if valid is None else valid.sum(1).int() for n, valid in gone)
        if self.logical_lens is not None:
            self.logical_lens -= removed
        return removed

    def _pieces(self, first: int, last: int) -> list[tuple[int, Tensor | None]]:
        """What arrived as columns [first, last)."""
        pieces, begin = [], 0
        for columns, valid in self._arrivals:
            low, high = max(first - begin, 0), min(last - begin, columns)
            if low < high:
                pieces.append((high - low, None if valid is None else valid[:, low:high]))
            begin += columns
        return pieces

    def _recount(self, most: int) -> None:
        """Rows have new lengths, at most `most`: find the longest where that stalls nothing."""
        if self.seq_lens.is_cuda:
            self.max_len, self._uniform = most, False
        else:
            lens = self.seq_lens.tolist()
            self.max_len, self._uniform = max(lens), max(lens) == min(lens)

    def _scatter(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor | int:
        """Write each row's valid tokens behind its last one; returns how many a row received."""
        batch, _, count, _ = k.shape
        rows = torch.arange(batch, device=k.device)[:, None]
        steps = torch.arange(count, device=k.device)
        added: Tensor | int = count
        if valid is not None:
            if count > 1:
                order = (~valid).argsort(dim=1, stable=True)  # valid tokens first, in order
                index = order[:, None, :, None].expand_as(k)
                k, v = k.gather(2, index), v.gather(2, index)
            added = valid.sum(1).int()
            self._uniform = False
        # A row's padding lands behind its valid tokens, where the next append overwrites it.
        slots = self.seq_lens.long()[:, None] + steps
        self._k[rows, :, slots] = k.transpose(1, 2)
        self._v[rows, :, slots] = v.transpose(1, 2)
        return added

    def _reserve(self, like: Tensor, length: int) -> None:
        if length <= self.capacity:
            return
        capacity = max(length, FIRST_CAPACITY, int(self.capacity * GROWTH))
        if self._most is not None:
            budget, window = self._most
            if capacity >= budget:  # all that comes before the next eviction
                step = like.shape[2] == 1  # and so of the window; after a prompt, all of it follows
                capacity = max(length, budget + window) if step else max(length, budget) + window
        if self._k is None:
            self._k, self._v = like[:, :, :0], like[:, :, :0]
        self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        """Move the kept tokens and what `slots` says about them to memory of another size."""

        def moved(old: Tensor, by_token: bool = False) -> Tensor:
            return _padded(old[:, :, : min(old.shape[2], self.max_len)], capacity, by_token)

        _, heads, _, dim = self._k.shape
        row = heads * dim * self._k.element_size()
        by_token = self.shared_sets and self._k.is_cpu and row >= TOKEN_ROW
        self._k = moved(self._k, by_token)
        self._v = moved(self._v, by_token)
        self.slots = {name: moved(tensor) for name, tensor in self.slots.items()}

    def _check(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        if k.ndim != 4 or v.shape != k.shape or 0 in k.shape:
            raise ValueError(
                "kvcomp: append: expected k and v of one shape [B, Hkv, n, D] with nothing empty,"
                f" got {list(k.shape)} and {list(v.shape)}"
            )
        if valid is not None and valid.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"kvcomp: append: argument 'valid': expected [{k.shape[0]}, {k.shape[2]}],"
                f" got {list(valid.shape)}"
            )
        if self._k is None:
            return
        have, got = self._k, k
        for what, old, new in (
            ("batch size", have.shape[0], got.shape[0]),
            ("KV heads", have.shape[1] // self._copies, got.shape[1]),
            ("head size", have.shape[3], got.shape[3]),
            ("dtype", have.dtype, got.dtype),
            ("device", have.device, got.device),
        ):
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
