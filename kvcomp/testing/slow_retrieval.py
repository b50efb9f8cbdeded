"""Slow readings of the retrieval methods: lists of token numbers, one row of one layer at a time.

A `Walk` makes queries that dwell on a topic and then turn; a `Slow` decodes it step by step as the
texts of the methods describe it, with attention in float64 over a set of tokens; `assert_follows`
holds a method against it, down to what every slot, pool row and digest is.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from kvcomp import ops
from kvcomp.methods import Method
from kvcomp.testing.slow_eviction import DIM, HEADS, SPARE, Trace, new_cache, rotate


class Walk(Trace):
    """A trace whose queries dwell on a topic for some steps; rows and layers turn by themselves."""

    def __init__(self, *lens, steps, layers=1, seed=0, dwell=9, dtype=torch.float32):
        super().__init__(*lens, steps=steps, layers=layers, seed=seed)
        total = max(lens) + steps + SPARE
        generator = torch.Generator().manual_seed(seed + 1)
        shape = layers, len(lens), total
        turns = torch.rand(shape, generator=generator) < 1 / dwell
        topics = torch.randn(*shape[:2], total, HEADS, DIM, generator=generator)
        about = turns.cumsum(-1)[..., None, None].expand(-1, -1, -1, HEADS, DIM)
        noise = torch.randn(*shape, HEADS, DIM, generator=generator)
        self.raw_q = (1.5 * topics.gather(2, about) + 0.3 * noise).transpose(2, 3)
        self.q = rotate(self.raw_q, range(total))
        self.q, self.k, self.v = (x.to(dtype) for x in (self.q, self.k, self.v))


class Recorded(Trace):
    """What a model's attention saw: q, k, v [layers, B, H, tokens, D]."""

    def __init__(self, q, k, v, *lens):
        self.q, self.k, self.v, self.lens = q, k, v, lens
        self.layers, self.steps, self.scale = len(q), q.shape[3] - max(lens), q.shape[4] ** -0.5

    @classmethod
    def of(cls, recorder: Recorder, prompt: int) -> Recorded:
        """The latest cache of a recorder, of rows of one length."""
        q, k, v = (torch.stack(x) for x in recorder.seen())
        return cls(q, k, v, *[prompt] * q.shape[1])


class Recorder(Method):
    """Dense attention that keeps the queries."""

    def start(self, cache):
        self.cache, self.queries = cache, [[] for _ in cache.layers]

    def prefill(self, layer, q):
        self.queries[layer.position].append(q.detach().clone())

    def attend(self, layer, q, scale):
        self.queries[layer.position].append(q.detach()[:, :, None].clone())
        return layer.attend(q, scale)[0]

    def seen(self):
        """Of each layer [B, H, tokens, D]: queries, keys, values."""
        layers = self.cache.layers
        queries = [torch.cat(pieces, 2) for pieces in self.queries]
        return queries, [x.keys for x in layers], [x.values for x in layers]


class Slow:
    """One row of one layer: where each of its tokens is, step by step.

    Attributes:
        sinks, open: tokens.
        units: per head the units that can be selected, each a list of tokens, first to last.
        local: per closed segment that is still local, its units, as `units` has them.
        rows: per head the token that each row of the pool stands for.
        selected: per head a set of tokens.
    """

    def __init__(self, method, trace, layer, row):
        self.method, self.dtype = method, trace.k.dtype
        self.own = tuple(x[layer, row] for x in (trace.q, trace.k, trace.v))
        self.q, self.k, self.v = (x.double() for x in self.own)
        self.heads, self.scale = len(self.k), trace.scale
        self.seen, self.sinks, self.open, self.local = 0, [], [], []
        self.units, self.rows = ([[] for _ in range(self.heads)] for _ in range(2))
        self.retrievals = self.wanted = self.fetched = self.stored = 0
        self.segments, self.made = [], {}
        self.fill(trace.lens[row])

    # What the methods differ in.

    def cut(self, head, tokens):
        """Consecutive tokens of a prompt -> units."""
        raise NotImplementedError

    def recut(self, head, tokens):
        """Tokens of a segment of the output -> units."""
        return [tokens]

    def digest(self, head, tokens):
        """[W] in the dtype of the keys."""
        return self.k[head, tokens].mean(0).to(self.dtype)

    def worth(self, head, units, q):
        """Logits [G, U] of the group's queries."""
        return q @ self.digests(head, units).double().T * self.scale

    def turned(self, similarity):
        return False

    def wants(self, similarity):
        return True

    def digests(self, head, units):
        """[U, W], each made once."""
        keys = [(head, tuple(unit)) for unit in units]
        for key, unit in zip(keys, units, strict=True):
            if key not in self.made:
                self.made[key] = self.digest(head, unit)
        return torch.stack([self.made[key] for key in keys])

    # The rules that all share.

    def group(self, q, head):
        size = len(q) // self.heads
        return q[head * size : head * size + size]

    def fill(self, count):
        """A prompt, or a further turn: all but its newest tokens leave the device."""
        tokens = list(range(self.seen, self.seen + count))
        if not self.seen:
            self.sinks, tokens = tokens[: self.method.sinks], tokens[self.method.sinks :]
            self.rows = [list(self.sinks) for _ in self.rows]
        else:
            self.close()
            while self.local:
                self.let_go()
        self.seen += count
        self.stored += len(tokens)
        middle = max(len(tokens) - self.method.num_newest, 0)
        older, newest = tokens[:middle], tokens[middle:]
        for head in range(self.heads):
            units = self.cut(head, older) if older else []
            self.units[head] += units
            self.rows[head] += _flat(units) + newest
        size = self.method.unit_size
        for first in range(0, len(newest), size):
            self.local.append([[newest[first : first + size]] for _ in range(self.heads)])
        self.selected = [set() for _ in range(self.heads)]
        self.query = None

    def close(self):
        if not self.open:
            return
        units = [self.recut(head, self.open) for head in range(self.heads)]
        self.local.append(units)
        for head, row in enumerate(self.rows):
            row += _flat(units[head])
        self.stored += len(self.open)
        self.open = []

    def let_go(self):
        for head, units in enumerate(self.local.pop(0)):
            self.units[head] += units

    def local_tokens(self):
        return _flat(_flat(units[0]) for units in self.local) + self.open

    def resident(self, head):
        return set(self.sinks) | self.selected[head] | set(self.local_tokens())

    def similarity(self, q):
        if self.query is None:
            return -torch.inf
        return torch.nn.functional.cosine_similarity(q, self.query, dim=-1).mean().item()

    def step(self):
        method, (shortest, longest) = self.method, self.method.segment
        q = self.q[:, self.seen]
        similarity = self.similarity(q)
        self.query = q
        if (self.turned(similarity) and len(self.open) >= shortest) or len(self.open) >= longest:
            if self.open:
                self.segments.append(len(self.open))
            self.close()
        limit = method.local + longest
        self.forced = len(self.local_tokens()) >= limit
        self.triggered = self.wants(similarity) or self.forced
        if self.triggered:
            before = [self.resident(head) for head in range(self.heads)]
            while self.local and len(self.local_tokens()) > method.local:
                self.let_go()
            self.select(q, before)
        self.open.append(self.seen)
        self.seen += 1
        return torch.cat([self.attend(q, head) for head in range(self.heads)])

    def after(self):
        """What a step does once its outputs are known."""

    def select(self, q, before):
        self.retrievals += 1
        for head in range(self.heads):
            units, chosen = self.units[head], []
            if units:
                worth = self.worth(head, units, self.group(q, head)).softmax(-1).mean(0).tolist()
                for unit in sorted(range(len(units)), key=lambda u: (-worth[u], u)):
                    chosen += units[unit]
            self.selected[head] = set(chosen[: self.method.budget])
            self.wanted += len(self.selected[head])
            self.fetched += len(self.selected[head] - before[head])

    def attend(self, q, head):
        tokens = sorted(self.resident(head) | {self.open[-1]})
        probs = (self.group(q, head) @ self.k[head, tokens].T * self.scale).softmax(-1)
        return probs @ self.v[head, tokens]


class SlowClustered(Slow):
    """PerTokenRetrieval, and what the other clustered methods share."""

    def cluster(self, head, tokens, size, window):
        bounds = torch.tensor([[0], [len(tokens)]], dtype=torch.int32)
        keys = self.own[1][None, :, tokens]
        iterations = self.method.iterations
        labels, _, _ = ops.kmeans(
            keys, *bounds, cluster_size=size, window=window, iterations=iterations
        )
        units = {}
        for token, label in zip(tokens, labels[0, head].tolist(), strict=True):
            units.setdefault(label, []).append(token)
        return [units[label] for label in sorted(units)]

    def cut(self, head, tokens):
        return self.cluster(head, tokens, self.method.cluster_size, self.method.window)

    def turned(self, similarity):
        return similarity < self.method.tau


class SlowLouis(SlowClustered):
    def wants(self, similarity):
        return similarity < self.method.tau


class SlowStride(SlowClustered):
    """Anew where a segment ends, and at the first step."""

    def turned(self, similarity):
        return False

    def step(self):
        self.ends = len(self.open) >= self.method.stride
        return super().step()

    def wants(self, similarity):
        return similarity == -torch.inf or self.ends


class SlowClusterKV(SlowClustered):
    def turned(self, similarity):
        return False

    def recut(self, head, tokens):
        return self.cluster(head, tokens, self.method.output_cluster, self.method.output_window)


class SlowPages(Slow):
    """Quest: the largest logit that lies in the box of a page's keys."""

    def cut(self, head, tokens):
        size = self.method.page_size
        return [tokens[first : first + size] for first in range(0, len(tokens), size)]

    def digest(self, head, tokens):
        keys = self.own[1][head, tokens]
        return torch.cat([keys.amax(0), keys.amin(0)])

    def worth(self, head, units, q):
        high, low = self.digests(head, units).double().chunk(2, -1)
        return torch.maximum(q[:, None] * low, q[:, None] * high).sum(-1) * self.scale


class SlowArkVale(SlowPages):
    """The same over a box of the centre, plus and minus the mean deviation from it."""

    def digest(self, head, tokens):
        keys = self.own[1][head, tokens]
        centre = keys.mean(0)
        return torch.cat([centre, (keys - centre).abs().mean(0)])

    def worth(self, head, units, q):
        centre, deviation = self.digests(head, units).double().chunk(2, -1)
        corners = [(q[:, None] * (centre + side * deviation)) for side in (-1, 1)]
        return torch.maximum(*corners).sum(-1) * self.scale


class SlowFreeKV(SlowPages):
    """Each step's own selection serves the next; where the queries turn, itself."""

    def step(self):
        self.own_selection = False
        return super().step()

    def wants(self, similarity):
        self.own_selection = similarity < self.method.tau
        return self.own_selection

    def after(self):
        if not self.own_selection:
            self.select(self.query, [self.resident(head) for head in range(self.heads)])


SLOW = {
    "louis-kv": SlowLouis,
    "per-token-retrieval": SlowClustered,
    "stride-retrieval": SlowStride,
    "cluster-kv": SlowClusterKV,
    "quest": SlowPages,
    "arkvale": SlowArkVale,
    "free-kv": SlowFreeKV,
}


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
            slow = [[_copy(of[row]) for row in rows] for of in slow]
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
    method, index = slow.method, layer.index
    layer.settle()
    length = int(layer.seq_lens[row])
    local, indexed = slow.local_tokens(), int(index.num_indexed[row])
    assert int(layer.logical_lens[row]) == slow.seen, where
    assert len(local) <= method.local + method.segment[1], where
    assert length < method.most_resident, where
    held = layer.positions(layer.keys.shape[1])[row, :, :length]
    stored = slow.seen - len(slow.open)
    pool_k, pool_v = layer.pool.read(row, 0, stored)
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
        everything = _flat(found) + slow.sinks + slow.open
        assert sorted(everything) == list(range(slow.seen)), of  # each token in one place
        assert len(slow.selected[head]) <= method.budget, of
        if found:
            digests = index.digests[row, head, : len(sizes)][torch.tensor(sizes) > 0]
            _assert_close(digests, slow.digests(head, found), of)
    assert int(index.first_open()[row]) == slow.seen - len(slow.open), where


def _assert_close(got, wanted, where):
    exact = got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(),
        wanted.double(),
        rtol=1e-4 if exact else 2e-2,
        atol=2e-5 if exact else 2e-2,
        msg=lambda m: f"{where}: {m}",
    )


def _flat(lists):
    return [item for items in lists for item in items]


def _copy(slow):
    copy = object.__new__(type(slow))
    copy.__dict__.update(slow.__dict__)
    copy.units = [list(units) for units in slow.units]
    copy.rows = [list(rows) for rows in slow.rows]
    copy.local, copy.open = list(slow.local), list(slow.open)
    copy.selected = [set(tokens) for tokens in slow.selected]
    copy.segments = list(slow.segments)
    return copy
