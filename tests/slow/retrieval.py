"""Slow readings of the retrieval methods: lists of token numbers, one row of one layer at a time.

A `Slow` decodes a trace step by step as the texts of the methods describe it, with attention in
float64 over a set of tokens; `slow.retrieval_check` holds a method against it.
"""

from __future__ import annotations

import torch

from kvcomp import ops


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

    def copy(self):
        """A reading that goes on by itself."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.units = [list(units) for units in self.units]
        copy.rows = [list(rows) for rows in self.rows]
        copy.local, copy.open = list(self.local), list(self.open)
        copy.sinks = list(self.sinks)
        copy.selected = [set(tokens) for tokens in self.selected]
        copy.segments = list(self.segments)
        return copy

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
        self.close()
        while self.local:
            self.let_go()
        missing = self.method.sinks - len(self.sinks)
        self.sinks, tokens = self.sinks + tokens[:missing], tokens[missing:]
        if missing:
            self.rows = [list(self.sinks) for _ in self.rows]
        self.seen += count
        self.stored += len(tokens)
        middle = max(len(tokens) - self.method.num_newest, 0)
        older, newest = tokens[:middle], tokens[middle:]
        for head in range(self.heads):
            units = self.cut(head, older) if older else []
            self.units[head] += units
            self.rows[head] += flat(units) + newest
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
            row += flat(units[head])
        self.stored += len(self.open)
        self.open = []

    def let_go(self):
        for head, units in enumerate(self.local.pop(0)):
            self.units[head] += units

    def local_tokens(self):
        return flat(flat(units[0]) for units in self.local) + self.open

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
        if len(self.sinks) < method.sinks:
            self.sinks.append(self.seen)
            self.rows = [list(self.sinks) for _ in self.rows]
        else:
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
        tokens = sorted(self.resident(head) | {self.seen - 1})
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


def flat(lists):
    return [item for items in lists for item in items]
