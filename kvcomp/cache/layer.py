"""LayerCache: the tokens that one layer has seen, and the K and V that it keeps.

There are two lengths. The *logical* length counts the tokens that the model has seen; positions,
masks and `get_seq_length` use it. The *physical* length counts the tokens that are kept; kernels
use only that. Pad tokens never enter the slab, so the rows of a batch are ragged, and kernels never
see padding.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.arrivals import Arrivals
from kvcomp.cache.hosted import Hosted
from kvcomp.cache.later import forget, known, later
from kvcomp.cache.moved import Moved
from kvcomp.cache.rows import WORDS, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvcomp.cache.kv_cache import KVCache


class LayerCache(Moved):
    """The tokens of one layer, in a `Slab` that is allocated at the first `append`.

    Attributes:
        position: number of this layer among the layers that the method manages, from 0.
        seq_lens: [B] int32, physical length of each row.
        logical_lens: [B] int32, logical length of each row, without padding.
        columns: columns of the batch seen so far, padding included.
        first: whether the last `append` brought the first columns.
        state: the method's notes on the rows of this layer, tensors [B, ...] that follow the rows
            through `select`.
        scale: factor of the logits, known from the first prompt on.
        is_shared: whether other layers of the model attend to K and V of this one.
        sinks: [Hq], learned logits of a token without a value in every softmax; None: the model has
            none.
        softcap: of the logits, see `ops.decode_attention`; None: the model has none.
        added: tokens that each row gained by the last `append`, a number or [B] int32.
        hosted: all of the tokens in host memory, for methods that retrieve (see `is_hosted`).

    `seq_lens` and `logical_lens` exist from the first `append` on (see `filled`). Reading them
    earlier raises AttributeError.
    """

    seq_lens: Tensor = later("the first append")
    logical_lens: Tensor = later("the first append")
    hosted: Hosted = later("a method that retrieves has got the prompt")
    _placed: Tensor = later("positions are asked for")  # [B] logical lengths when last written

    def __init__(self, cache: KVCache, position: int) -> None:
        self.own(cache)
        self.eight_bits = cache.eight_bits
        self.position = position
        self.is_shared = False
        self.reset()

    def own(self, cache: KVCache) -> None:
        """Make this a layer of `cache`. The layer does not keep the cache alive, so an unused cache
        frees its memory at once and not when Python collects cycles."""
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> KVCache:
        cache = self._cache()
        if cache is None:
            raise ReferenceError("kvcomp: the cache of this layer is gone; keep a reference to it")
        return cache

    def reset(self) -> None:
        """Forget everything and free the memory."""
        super().reset()
        forget(self, "seq_lens", "logical_lens", "hosted", "_placed")
        self.columns = 0
        self.first = True
        self.scale = 1.0
        self.sinks: Tensor | None = None
        self.softcap: float | None = None
        self.added: int | Tensor = 0
        self.state: dict[str, Tensor] = {}
        self._placed_columns = 0
        self._whole = True  # nothing has been evicted
        self._uniform = True  # every row has max_len tokens, so an append is one slice copy
        self._arrivals = Arrivals()

    @property
    def filled(self) -> bool:
        """Whether there have been tokens since the last `reset`."""
        return known(self, "seq_lens")

    def host(self, *arguments: Any) -> None:
        """Keep all of the tokens in host memory; the arguments are those of `Hosted`."""
        self.hosted = Hosted(self, *arguments)

    @property
    def is_hosted(self) -> bool:
        """Whether all of the tokens are in host memory."""
        return known(self, "hosted")

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that hold K and V."""
        return self.hosted.pool.nbytes if self.is_hosted else 0

    @property
    def row_note_bytes(self) -> int:
        """Bytes of the notes on rows: `state`, and the index of units if the method retrieves."""
        units = self.hosted.index.nbytes if self.is_hosted else 0
        return sum(tensor.nbytes for tensor in self.state.values()) + units

    def has_room(self, count: int) -> bool:
        """Whether `count` more tokens go into memory that there is."""
        return self.filled and self.max_len + count <= self.capacity

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Add n tokens to every row.

        Args:
            k, v: [B, Hkv, n, D].
            valid: [B, n] bool, False for padding, which is seen but not kept; None: all valid.

        Raises:
            ValueError: batch size, head count, head size, dtype or device differ from before.
        """
        k, v = self._as_kept(k.detach(), v.detach())
        self._check(k, v, valid)
        if not self.filled:
            self._dtype = k.dtype
        self._enter(self._encoded(k, v), valid)

    def _enter(self, new: Rows, valid: Tensor | None) -> None:
        """`append` of tokens as they are kept."""
        valid = None if valid is None else valid.to(new.k.device)
        batch, _, count, _ = new.k.shape
        if not self.filled:
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=new.k.device)
            self.logical_lens = self.seq_lens.clone()
        self._reserve(new, self.max_len + count)
        if not self.token_bytes:
            self._count_bytes()
        self.added = self._put(new, valid)
        self.first = not self.columns
        self.max_len += count
        self.columns += count
        self._arrivals.add(count, valid)

    def remember(self, name: str, note: Tensor) -> Tensor:
        """Set `state[name]` to a note that decode steps change in place."""
        self.state[name] = note
        return note

    def positions(self, units: int) -> Tensor:
        """[B, units, max_len] int32: the position of every kept token in its sequence.

        Tokens are appended in order, so the table is updated here and not at every step.
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
        """Remove tokens in place and free memory that is no longer needed.

        Args:
            victims: [B, U, V] int32 slots, ascending, then -1, as `ops.select_victims` returns.
            kept_lens: [B] int32: length to which longer rows are cut.
            shortest, longest: bounds of `kept_lens`, known on the host.
        """
        self.cache.meter.evicting(self, kept_lens)
        ops.compact_kv(
            *self.stored(self.capacity)[:2], list(self.slots.values()), victims, self.seq_lens
        )
        torch.minimum(self.seq_lens, kept_lens, out=self.seq_lens)
        slot = torch.arange(shortest, self.max_len, device=self.seq_lens.device)
        free = slot >= self.seq_lens[:, None, None]
        for tensor in self.slots.values():
            tensor[..., shortest : self.max_len].masked_fill_(free, 0)
        self._whole = False
        self._shrink(longest)

    def keep(self, slots: Tensor, lens: Tensor) -> None:
        """Keep only the listed tokens, in that order, and free memory that is no longer needed.

        Args:
            slots: [B, M] int64; the first lens[b] of row b count.
            lens: [B] int32.
        """
        self._gather(slots)
        self.seq_lens, self.max_len = lens, slots.shape[1]
        self._whole = False
        self._recount(slots.shape[1])

    @contextmanager
    def rewriting(self, most: int) -> Iterator[Rows]:
        """K and V [B, Hkv, capacity, D] with room for `most` tokens in each row, to be written in
        place together with `slots` and `seq_lens`. No row is longer than `most` afterwards."""
        self._reserve(self.stored(1), most)
        yield self.stored(self.capacity)
        self._recount(most)

    def settle(self) -> None:
        """Wait for background work on the tokens in host memory."""
        if self.is_hosted:
            self.hosted.settle()

    def crop(self, count: int) -> None:
        """Take back the last `count` columns exactly, as if they had never been appended.

        Raises:
            ValueError: more columns than were seen, or some tokens have been evicted.
        """
        if count > self.columns:
            raise ValueError(
                f"kvcomp: crop of {count} tokens, but this layer has seen {self.columns}"
            )
        if not self._whole:
            raise ValueError(f"kvcomp: crop of {count} tokens, but tokens have been evicted")
        removed = self._take_back(count)
        if self.filled:
            self.seq_lens -= removed
            self.max_len = int(self.seq_lens.max())

    def seen(self) -> Tensor:
        """[B, columns] bool: True for tokens, False for padding."""
        return self._arrivals.valid(len(self.seq_lens), self.seq_lens.device)

    def shows(self, mask: Tensor) -> bool:
        """Whether mask [B, columns] bool shows exactly the tokens that have been seen."""
        return torch.equal(mask, self.seen().to(mask.device))

    def select(self, rows: Tensor) -> None:
        """Reorder, repeat or drop sequences: rows become `rows` ([B'] int64 indices)."""
        if not self.filled:
            return
        rows, self._accepted = rows.to(self._k.device), None
        if self.is_hosted:
            self.hosted.select(rows)
        self._arrivals.select(rows)
        self._k, self._v = self._k[rows], self._v[rows]
        self.seq_lens, self.logical_lens = self.seq_lens[rows], self.logical_lens[rows]
        self.state = {name: tensor[rows] for name, tensor in self.state.items()}
        self.slots = {name: tensor[rows] for name, tensor in self.slots.items()}
        if known(self, "_placed"):
            self._placed = self._placed[rows]

    def _require_whole(self, what: str) -> None:
        noted = self.slots.keys() - {WORDS}
        if not self._whole or noted or self.state or self.is_hosted or self._copies > 1:
            raise ValueError(
                f"kvcomp: {what}: expected a layer that keeps every token and no notes"
            )

    def _take_back(self, count: int) -> Tensor | int:
        """Forget the last `count` columns. Returns the number of tokens of each row in them."""
        kept = self.columns - count
        removed = self._arrivals.part(kept, self.columns).tokens()
        self._arrivals, self.columns = self._arrivals.part(0, kept), kept
        if self.filled:
            self.logical_lens -= removed
        return removed

    def level(self) -> None:
        """Rows have got different numbers of tokens. Find the longest again."""
        self._recount(self.max_len)

    def _recount(self, most: int) -> None:
        """Rows have new lengths, at most `most`. Find the longest unless that would stall a GPU."""
        if self.seq_lens.is_cuda:
            self.max_len, self._uniform = most, False
        else:
            lens = self.seq_lens.tolist()
            self.max_len, self._uniform = max(lens), max(lens) == min(lens)

    def _put(self, new: Rows, valid: Tensor | None) -> Tensor | int:
        """Write the valid tokens of each row behind its last one, and count them. Returns their
        number per row."""
        added: Tensor | int = new.k.shape[2]
        if valid is not None:
            if added > 1:
                order = (~valid).argsort(dim=1, stable=True)  # valid tokens first, in order
                new = new.take(order[:, None], 2)
            added = valid.sum(1, dtype=torch.int32)
            self._uniform = False
        self._write(new, self.seq_lens, self.logical_lens, added)
        return added

    def _place(self, new: Rows) -> None:
        """Write tokens behind the last one of each row, where the next ones overwrite them."""
        lens = self.seq_lens.clone()
        self._write(new, lens, lens, new.k.shape[2])

    def _write(self, new: Rows, lens: Tensor, logical: Tensor, added: Tensor | int) -> None:
        """Write the first `added` tokens of each row behind its `lens`, and add them to both."""
        if new.k.is_cpu and not is_compiling():
            ops.append_rows(
                new.k,
                new.v,
                self._k,
                self._v,
                lens,
                None if logical is lens else logical,
                new.words,
                None if new.words is None else self.slots[WORDS],
                None if isinstance(added, int) else added,
            )
            return
        kept = self.stored(self.capacity).parts
        if self._uniform:
            for part, value in zip(kept, new.parts, strict=True):
                part[:, :, self.max_len : self.max_len + value.shape[2]] = value
        else:
            batch, _, count, _ = new.k.shape
            row = torch.arange(batch, device=lens.device)[:, None]
            # Padding lands behind a row's valid tokens, where the next append overwrites it.
            slot = lens.long()[:, None] + torch.arange(count, device=lens.device)
            for part, value in zip(kept, new.parts, strict=True):
                part[row, :, slot] = value.transpose(1, 2)
        lens.add_(added)
        if logical is not lens:
            logical.add_(added)


is_compiling = torch.compiler.is_compiling  # looked up once
