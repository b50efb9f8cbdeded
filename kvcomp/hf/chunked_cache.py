"""ChunkedCache: the successive contexts of one batch, behind one cache for `generate`.

`generate` sees a sequence that only grows. The decoder sees the context of the current chunk: the
tokens of a forward go to the cache of that context, at their positions in it. Before the last token
of a chunk comes in, the next context is made, and the token becomes its last one.

All rows of a batch begin together, so a chunk ends for all rows in the same step. Finished rows
continue with padding, as in `generate` without chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from kvcomp.cache import Meter
from kvcomp.cache.later import forget, known, later
from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_drafts import ChunkedDrafts
from kvcomp.hf.next_context import Encode, NextContext, now
from kvcomp.hf.text import first_difference
from kvcomp.methods.delethink import Chunk, Delethink


class ChunkedCache(ChunkedDrafts, TransformersCache):
    """A transformers cache under `Delethink`.

    Args:
        method: the schedule.
        new_context: makes an empty cache.
        longest: number of positions that the model supports; None: unknown.
        whole: whether the model's keys depend on the length of their context (RoPE with
            frequencies that change with it), so that a context must be encoded in one piece.
        renews: (context, columns) -> whether the model's `generate` would drop the cache of a
            context when it grows to this number of columns.

    Attributes:
        context: the cache of the current chunk, which the model's layers see.
        index, chunk: number and bounds of the current chunk.
        produced: number of output tokens that have come in.
    """

    _prompt: Tensor = later("the prompt")  # [B, columns] ids
    _output: Tensor = later("the output")  # [B, room] ids, less those that `_forget` took out

    def __init__(
        self,
        method: Delethink,
        new_context: Callable[[], Cache],
        longest: int | None,
        *,
        whole: bool,
        renews: Callable[[Cache, int], bool],
    ) -> None:
        self.method, self.longest, self.whole = method, longest, whole
        self._new_context, self._renews = new_context, renews
        self.context = new_context()
        super().__init__(layers=self.context.layers)
        self._begin()

    def _begin(self) -> None:
        chunk = self.method.chunk_at(0)
        assert chunk is not None, "max_chunks is at least 1"
        self.index, self.chunk = 0, chunk
        self.produced = 0
        self.prompt_columns = 0  # that `generate` announced
        forget(self, "_prompt", "_output")
        self._mask: Tensor | None = None  # [B, columns] of the prompt; None: no padding
        self._forgotten = 0  # output tokens after the head
        self._next: NextContext | None = None  # being encoded, with reset="streaming"
        self.staging = False  # whether the tokens of the next forward are drafts
        self._began: float | None = None  # the forward that encodes the new context

    def __deepcopy__(self, memo: dict) -> ChunkedCache:
        copy = object.__new__(ChunkedCache)
        memo[id(self)] = copy
        own = dict(self.__dict__)
        shared = {name: own.pop(name) for name in ("method", "_new_context", "_renews")}
        own["_next"] = None  # the copy makes its own
        memo[id(self.context.kv.beside)] = []
        copy.__dict__.update(shared | deepcopy(own, memo))
        return copy

    @property
    def meter(self) -> Meter:
        return self.context.kv.meter

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch seen in all chunks, padding included."""
        return (self._prompt.shape[1] if known(self, "_prompt") else 0) + self.produced

    @property
    def rows(self) -> int:
        """The number of sequences; 0 before the first tokens."""
        return len(self._prompt) if known(self, "_prompt") else 0

    def first_difference(self, ids: Tensor, mask: Tensor | None) -> tuple[int, int] | None:
        """Column and row where a text [B, tokens] differs from the prompt so far."""
        columns = self._prompt.shape[1]
        seen, given = (
            torch.ones_like(self._prompt) if x is None else x[:, :columns]
            for x in (self._mask, mask)
        )
        return first_difference(self._prompt, ids[:, :columns], seen.bool(), given.bool())

    def settle(self) -> None:
        """Wait for background work on this cache."""
        if self._next is not None:
            self._next.settle()

    def reset(self) -> None:
        self.settle()
        self._set_context(self._new_context())
        self._begin()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Reorder, repeat or drop rows in this context and in the next one if it has begun."""
        self.settle()
        self.context.batch_select_indices(indices)
        if self._next is not None:
            self._next.cache.batch_select_indices(indices)
        for name in ("_prompt", "_output"):
            if known(self, name):
                ids = getattr(self, name)
                setattr(self, name, ids[indices.to(ids.device)])
        if self._mask is not None:
            self._mask = self._mask[indices.to(self._mask.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.context.rows)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def announce(self, columns: int) -> None:
        """Tell the cache the number of columns of the prompt, which may come in several pieces and
        may be in already.

        Raises:
            ValueError: the cache has output already and has discarded most of it.
        """
        if self.produced or 0 < columns <= self.get_seq_length():
            raise ValueError(
                "kvcomp: past_key_values: delethink has discarded most of the output, so a"
                " second turn cannot continue from this cache; generate again from the whole"
                " conversation"
            )
        self.prompt_columns = columns

    def enter(self, given: dict[str, Any], encode: Encode) -> dict[str, Any]:
        """The arguments for the decoder in place of `given`. Crosses a boundary first if one is
        due."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            raise ValueError(
                "kvcomp: inputs_embeds: delethink encodes tokens again and needs their ids"
            )
        if self.staging:
            return self._with(given, self._enter_drafts(ids, encode))
        if self._is_prompt(ids):
            self._add_prompt(ids, mask)
            first = self.get_seq_length() - ids.shape[1]
            placed = self._placed(first, ids.shape[1])  # as those of the output will be
            if given.get("position_ids") is None:
                given = given | {"position_ids": placed["position_ids"]}
            else:
                _check_positions(given["position_ids"], placed)
            return given | {"past_key_values": self.context}
        self._check_output(ids, mask)
        self._add_output(ids)
        crosses = self.produced == self.chunk.stop
        try:
            if crosses and self.whole:
                self._cross_whole()
            elif crosses:
                self._cross(encode)
            elif self.method.reset == "streaming":
                self._encode_ahead(encode)
        except BaseException:
            self.produced -= 1  # the token has not come in, so it can come again
            self._next = None  # it may be incomplete
            raise
        seen = self.context.get_seq_length()
        if crosses and self.whole:
            placed = self._all_of_it(self._bounds(self.chunk)[1] + 1)
        elif self.prompt_columns and self._renews(self.context, seen + 1):
            self._set_context(self._new_context())
            self.context.kv.folded = self.chunk.carried - self.chunk.head
            placed = self._all_of_it(seen + 1)
        else:
            placed = self._placed(seen, 1)
        return self._with(given, placed)

    def _with(self, given: dict[str, Any], placed: dict[str, Any]) -> dict[str, Any]:
        if "cache_position" in given:  # of older versions of transformers
            placed["cache_position"] = None  # the cache implies it
        return given | placed | {"past_key_values": self.context}

    def left(self) -> None:
        """Called when the forward of `enter` has ended."""
        if self._began is not None:
            self.meter.boundary_seconds.append(now(self._prompt.device) - self._began)
            self._began = None

    # --- what comes in ----------------------------------------------------------------------------

    def _is_prompt(self, ids: Tensor) -> bool:
        columns = self.get_seq_length()
        in_pieces = ids.shape[1] > 1 and not self.produced
        return columns == 0 or columns < self.prompt_columns or in_pieces

    def _add_prompt(self, ids: Tensor, mask: Tensor | None) -> None:
        joined = torch.cat([self._prompt, ids], 1) if known(self, "_prompt") else ids
        if mask is None and self._mask is not None:  # what follows is not padding
            mask = torch.nn.functional.pad(self._mask, (0, ids.shape[1]), value=1)
        if mask is not None and (mask.ndim != 2 or bool(mask.bool().all())):
            mask = None
        valid = joined.shape[1]
        if mask is not None:
            if mask.shape == joined.shape and not bool((mask.int().diff(dim=1) >= 0).all()):
                raise ValueError(
                    "kvcomp: attention_mask: delethink expects padding on the left only"
                )
            valid = int(mask.sum(1).max())
        bound = valid + self.method.most_thought
        if self.longest is not None and bound > self.longest:
            raise ValueError(
                f"kvcomp: a prompt of {valid} tokens and up to {self.method.most_thought} of output"
                f" make a context of {bound}; the model knows {self.longest} positions"
            )
        self._prompt, self._mask = joined, mask

    def _check_output(self, ids: Tensor, mask: Tensor | None) -> None:
        if ids.shape[1] != 1:
            raise ValueError(
                f"kvcomp: delethink: expected one new token at a time after the prompt, got"
                f" {ids.shape[1]} (a second turn on one cache is not possible)"
            )
        columns = self.get_seq_length() + 1
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != columns):
            raise ValueError(
                f"kvcomp: attention_mask: expected {columns} columns ({columns - 1} seen, 1 new),"
                f" got {list(mask.shape)}"
            )
        if mask is not None and not mask.is_cuda and not bool(mask[:, -1].all()):
            raise ValueError("kvcomp: attention_mask: delethink: a row cannot skip a step")

    def _add_output(self, ids: Tensor) -> None:
        place, count = self.produced - self._forgotten, ids.shape[1]
        begun = known(self, "_output")
        if not begun or self._output.shape[1] < place + count:
            room = ids.new_zeros(len(ids), max(1024, place))
            self._output = torch.cat([self._output, room], 1) if begun else room
        self._output[:, place : place + count] = ids
        self.produced += count

    # --- contexts ---------------------------------------------------------------------------------

    def _tokens(self, chunk: Chunk, first: int, last: int) -> Tensor:
        """Ids of columns [first, last) of the context that generates `chunk`."""
        end = max(chunk.start, self.produced)
        parts = [
            self._prompt,
            self._output[:, : chunk.head],
            self._output[:, chunk.carried - self._forgotten : end - self._forgotten],
        ]
        return torch.cat(parts, 1)[:, first:last]

    def _forget(self, chunk: Chunk) -> None:
        """Drop output ids that no context after `chunk` needs: before its carry a context has only
        the head. So the number of ids is bounded too."""
        count = chunk.carried - chunk.head - self._forgotten
        if count > 0:
            rest = self._output[:, chunk.head + count :].clone()
            self._output[:, chunk.head : chunk.head + rest.shape[1]] = rest
            self._forgotten += count

    def _placed(self, first: int, count: int) -> dict[str, Tensor | None]:
        """Mask and positions of columns [first, first + count) of a context. Padding comes first
        in all contexts."""
        columns = torch.arange(first, first + count, device=self._prompt.device)
        if self._mask is None:
            return {"attention_mask": None, "position_ids": columns.expand(len(self._prompt), -1)}
        padding = self._mask.shape[1] - self._mask.sum(1, keepdim=True)
        more = first + count - self._mask.shape[1]
        mask = torch.nn.functional.pad(self._mask, (0, max(more, 0)), value=1)[:, : first + count]
        return {"attention_mask": mask, "position_ids": (columns - padding).clamp(min=0)}

    def _cross(self, encode: Encode) -> None:
        """Cross the boundary when a chunk's last token comes in. It ends the next context."""
        chunk = self._following()
        began = now(self._prompt.device)
        kept, last = self._bounds(chunk)
        if self.method.reset == "rotate":
            self._fold(kept, last)
            encoded = 0
        else:
            following = self._next or NextContext(self, chunk, self._rewound(kept))
            encoded = following.finish(encode)
            self._set_context(following.cache)
        self._begin_chunk(chunk)
        meter = self.meter
        meter.reencoded_tokens += encoded * len(self._prompt)
        meter.boundary_seconds.append(now(self._prompt.device) - began)

    def _cross_whole(self) -> None:
        """Cross the boundary if the forward of that token encodes its whole context."""
        self._began = now(self._prompt.device)
        chunk = self._following()
        self._set_context(self._new_context())
        self._begin_chunk(chunk)

    def _following(self) -> Chunk:
        chunk = self.method.chunk_at(self.index + 1)
        if chunk is None:
            raise ValueError(
                f"kvcomp: delethink: max_chunks={self.method.max_chunks} chunks are full, with"
                f" {self.chunk.stop} tokens of output"
            )
        return chunk

    def _begin_chunk(self, chunk: Chunk) -> None:
        self.index, self.chunk, self._next = self.index + 1, chunk, None
        self._forget(chunk)
        self.context.kv.folded = chunk.carried - chunk.head

    def _all_of_it(self, columns: int) -> dict[str, Tensor | None]:
        """Arguments for a forward over the whole context."""
        self.meter.reencoded_tokens += (columns - 1) * len(self._prompt)
        ids = self._tokens(self.chunk, 0, columns)
        return {"input_ids": ids, **self._placed(0, columns)}

    def _bounds(self, chunk: Chunk) -> tuple[int, int]:
        """Columns of a chunk's context: of prompt and head, and of all but its last token."""
        prefix = self._prompt.shape[1] + chunk.head
        return prefix, prefix + chunk.start - chunk.carried - 1

    def _rewound(self, columns: int) -> Cache:
        """Go back to the first `columns` columns of this context, or as far as it can."""
        if not self.context.all_managed:
            self._set_context(self._new_context())
            return self.context
        kv = self.context.kv
        kv.method.rewind(kv, columns)
        self.context.broken = False
        return self.context

    def _fold(self, kept: int, last: int) -> None:
        """Remove the columns between prefix and carry from the context in place."""
        kv = self.context.kv
        for layer in kv.layers:
            layer.fold(kept, layer.columns - (last - kept), kv.require_rotation())

    def _encode_ahead(self, encode: Encode) -> None:
        """Start or continue to encode the next context when a piece of its carry is known."""
        chunk = self.method.chunk_at(self.index + 1)
        if chunk is None or self.produced <= max(chunk.carried, chunk.head):
            return
        if self._next is None:
            cache = self._new_context()
            kept, last = self._bounds(chunk)
            if self.context.all_managed and self.method.attention.croppable:
                cache.kv.adopt(self.context.kv, kept, room=last + chunk.stop - chunk.start + 1)
            self._next = NextContext(self, chunk, cache)
        self._next.go_on(encode)

    def _set_context(self, cache: Cache) -> None:
        self.context, self.layers = cache, cache.layers


def _check_positions(given: Tensor, placed: dict[str, Any]) -> None:
    """Raise ValueError if a prompt has other positions [B, n] than `placed`, from which those of
    the output go on."""
    differs = given != placed["position_ids"].to(given.device)
    if (mask := placed["attention_mask"]) is not None:  # padding has any
        differs &= mask[:, -given.shape[-1] :].bool().to(given.device)
    if bool(differs.any()):
        raise ValueError(
            "kvcomp: position_ids: delethink counts the positions of each context from 0; expected"
            " these, or none"
        )
