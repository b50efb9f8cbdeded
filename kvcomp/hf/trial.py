"""Trial: tokens that are decoded beside a sequence and thrown away, which leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor

from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_run import ChunkedRun
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.hf.wrapper import first_position


class Trial:
    """A copy of some rows of a cache, to decode on: works with every method, and takes the memory
    of these rows a second time while it lives.

    Args:
        rows: [R] int64 indices of the rows that are copied.
    """

    def __init__(self, run: Run, cache: Cache, rows: Tensor) -> None:
        self.run = run
        self._begin = first_position(run.model)
        self.cache = deepcopy(cache, {id(cache.kv.beside): []})  # without those of the background
        self.cache.batch_select_indices(rows)

    def feed(self, ids: Tensor) -> Tensor:
        """Add ids [R, n] to every row; the logits [R, vocabulary] fp32 behind the last."""
        first = self.cache.kv.layers[0]
        seen = first.seen()
        mask = torch.cat([seen.long(), torch.ones_like(ids)], 1)
        places = seen.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        places = places + self._begin
        with torch.no_grad(), _beside(self.run):
            out = self.run.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.logits[:, -1].float()


@contextmanager
def trial(run: Run, rows: Tensor, cache: Cache | None = None) -> Iterator[Trial]:
    """Decode beside the cache of the latest forward, or `cache`; afterwards cache and report are as
    before.

    Raises:
        ValueError: there is no such cache, or it belongs to a static run.
    """
    cache = run.latest if cache is None else cache
    if isinstance(run, StaticRun):
        raise ValueError(
            "kvcomp: a trial needs a cache that grows: patch without max_tokens, got a static run"
        )
    if cache is None or cache.broken or not cache.columns:
        raise ValueError("kvcomp: a trial needs a cache of this run that has seen tokens, got none")
    meter, own = run.meter.__dict__, ("_decode_seconds", "_decoded_before", "_last_forward")
    counts = deepcopy(meter)
    times = {name: getattr(run, name) for name in own}
    try:
        yield Trial(run, cache, rows)
    finally:
        meter.clear()
        meter.update(counts)
        run.__dict__.update(times)


@contextmanager
def _beside(run: Run) -> Iterator[None]:
    """A forward that is no step of any sequence; under Delethink, one over a context itself."""
    run.trying = True
    try:
        with run.encodes() if isinstance(run, ChunkedRun) else nullcontext():
            yield
    finally:
        run.trying = False
