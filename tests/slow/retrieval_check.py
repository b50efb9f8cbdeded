"""Retrieval methods beside their slow readings, down to what every slot, pool row and digest is."""

from __future__ import annotations

from itertools import pairwise

import torch

from slow.eviction import new_cache
from slow.retrieval import SLOW, flat


def assert_follows(method, trace, *, turn=None, shuffle=None, steps=None):
    """Decode with a method beside its slow readings; returns these, [layer][row], and the cache.

    turn: (step, [tokens per row]) of a second turn. shuffle: (step, rows) for `KVCache.select`.
    """
    cache, first = new_cache(method, trace.layers), method.dense_layers
    cache.method.check(trace.layers)
    trace.fill(cache)
    rows = list(range(len(trace.lens)))
    slow = [
        [SLOW[method.name](method, trace, layer, row) for row in rows]
        for layer in range(first, trace.layers)
    ]
    extra = 0
    for step in range(trace.steps if steps is None else steps):
        if turn is not None and step == turn[0]:
            trace.fill(cache, turn[1], [n + step for n in trace.lens])
            extra = torch.tensor(turn[1])
            for one, count in ((s, c) for of in slow for s, c in zip(of, turn[1], strict=True)):
                one.fill(count)
        if shuffle is not None and step == shuffle[0]:
            rows = shuffle[1]
            cache.select(torch.tensor(rows))
            slow = [[of[row].copy() for row in rows] for of in slow]
        got = trace.decode(cache, step, torch.tensor(rows), extra=extra)
        for position, of in enumerate(slow, first):
            wanted = torch.stack([one.step() for one in of])
            where = f"step {step}, layer {position}"
            _assert_close(got[position], wanted, where)
            for row, one in enumerate(of):
                one.after()
                assert_holds(cache.layers[position], row, one, f"{where}, row {row}")
    if shuffle is None:
        assert_counted(cache.meter, slow, first)
    return slow, cache


def assert_counted(meter, slow, first):
    """The meter's figures of layers `first` and up are those of the slow readings."""
    for position, of in enumerate(slow, first):
        heads = of[0].heads
        assert int(meter.retrievals[position]) == sum(one.retrievals for one in of)
        assert int(meter.wanted_rows[position]) == sum(one.wanted for one in of)
        assert int(meter.fetched_rows[position]) == sum(one.fetched for one in of)
        assert int(meter.stored_rows[position]) == heads * sum(one.stored for one in of)
    cut = [length for of in slow for one in of for length in one.segments]
    counted = {n: int(count) for n, count in enumerate(meter.segments) if n and count}
    assert counted == {n: cut.count(n) for n in set(cut)}


def assert_holds(layer, row, slow, where):
    """Slots, pool and index of a row are what its slow reading says, bit for bit."""
    _, keys, values = slow.own
    method, index = slow.method, layer.hosted.index
    layer.settle()
    length = int(layer.seq_lens[row])
    local, indexed = slow.local_tokens(), int(index.num_indexed[row])
    assert int(layer.logical_lens[row]) == slow.seen, where
    assert len(local) <= method.local + method.segment[1], where
    assert length < method.most_resident, where
    held = layer.positions(layer.keys.shape[1])[row, :, :length]
    stored = slow.seen - len(slow.open)
    pool_k, pool_v, _ = layer.hosted.pool.read(row, 0, stored)
    for head in range(slow.heads):
        of = f"{where}, head {head}"
        tokens = torch.tensor(slow.rows[head] + slow.open)  # of each pool row
        slots = tokens[held[head].long()]
        resident = slow.resident(head)
        assert sorted(slots.tolist()) == sorted(resident), of  # so none twice
        assert torch.equal(layer.keys[row, head, :length], keys[head, slots]), of
        assert torch.equal(layer.values[row, head, :length], values[head, slots]), of
        assert torch.equal(pool_k[head], keys[head, tokens[:stored]]), of
        assert torch.equal(pool_v[head], values[head, tokens[:stored]]), of
        starts = index.starts[row, head, : int(index.num_units[row]) + 1].tolist()
        sizes = [end - begin for begin, end in pairwise(starts)]
        found = [tokens[b : b + n].tolist() for b, n in zip(starts, sizes, strict=False) if n]
        still = [unit for units in slow.local for unit in units[head]]
        assert found == slow.units[head] + still, of
        assert sum(n > 0 for n in sizes[:indexed]) == len(slow.units[head]), of
        everything = flat(found) + slow.sinks + slow.open
        assert sorted(everything) == list(range(slow.seen)), of  # each token in one place
        assert len(slow.selected[head]) <= method.budget, of
        if found:
            digests = index.digests[row, head, : len(sizes)][torch.tensor(sizes) > 0]
            _assert_close(digests, slow.digests(head, found), of)
    first_open = max(slow.seen - len(slow.open), method.sinks)
    assert int(index.first_open()[row]) == first_open, where


def _assert_close(got, wanted, where):
    exact = got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(),
        wanted.double(),
        rtol=1e-4 if exact else 2e-2,
        atol=2e-5 if exact else 2e-2,
        msg=lambda m: f"{where}: {m}",
    )
