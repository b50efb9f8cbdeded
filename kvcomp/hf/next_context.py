"""NextContext: encodes the next chunk's context in pieces while the current one is decoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.cache.background import Background
from kvcomp.hf.cache import Cache
from kvcomp.methods.delethink import Chunk

if TYPE_CHECKING:
    from kvcomp.hf.chunked_cache import ChunkedCache

Encode = Callable[..., None]  # one forward: (cache, input_ids=, attention_mask=, position_ids=)


class NextContext:
    """The context of the next chunk, encoded piece by piece, in the background or here.

    Attributes:
        cache: the encoded part; nothing else uses it before `finish`.
    """

    def __init__(self, owner: ChunkedCache, chunk: Chunk, cache: Cache) -> None:
        self.owner, self.chunk, self.cache = owner, chunk, cache
        self._first = self._sent = cache.get_seq_length()
        self._prefix, self._last = owner._bounds(chunk)
        self._background: Background | None = None
        self._wait: Callable[[], None] | None = None

    def go_on(self, encode: Encode) -> None:
        """Encode a piece in the background if one is known and no work is running."""
        if self._background is None:
            self._background = Background(self.owner._prompt.device)
            self.cache.kv.counted = False
            self.owner.context.kv.beside = [self.cache.kv]
        known = self._prefix + self.owner.produced - self.chunk.carried
        end = self._sent + self.owner.method.piece
        if end <= min(known, self._last) and not self._background.busy:
            if self._wait is not None:
                self._wait()  # only to raise the error of the piece before
            work, tensors = self._piece(encode, end)
            self._wait = self._background.submit(work, *tensors)

    def settle(self) -> None:
        """Wait for background work. `finish` raises its errors again."""
        if self._wait is not None:
            with suppress(Exception):
                self._wait()

    def finish(self, encode: Encode) -> int:
        """Encode the missing columns.

        Returns:
            the number of columns encoded in total, including in the background.
        """
        if self._wait is not None:
            self._wait()
        step = self.owner.method.piece if self._background else self._last
        while self._sent < self._last:
            self._piece(encode, min(self._sent + step, self._last))[0]()
        self.cache.kv.counted = True
        return self._last - self._first

    def _piece(self, encode: Encode, end: int) -> tuple[Callable[[], None], list[Tensor]]:
        """The work of encoding columns up to `end`, and the tensors that it reads."""
        ids = self.owner._tokens(self.chunk, self._sent, end)
        placed = self.owner._placed(self._sent, end - self._sent)
        self._sent = end
        tensors = [ids, *(tensor for tensor in placed.values() if tensor is not None)]
        return lambda: encode(self.cache, input_ids=ids, **placed), tensors


def now(device: torch.device) -> float:
    """The time in seconds once the device has done all decoding work; background work goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
