"""Slow readings of the eviction methods: one unit of one row at a time, in the order of the text.

A `Trace` makes keys, values and queries of a few rows; a `Slow` decodes them step by step with
tokens in a plain list, as a paper would describe it; `assert_follows` holds a method against it.
"""

from __future__ import annotations

import math

import torch

from kvcomp.cache import KVCache

HEADS, KV_HEADS, DIM = 4, 2, 32
SCALE = DIM**-0.5
INV_FREQ = 10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
SPARE = 20  # tokens of a trace beyond prompt and steps
UNITS = {"query_head": HEADS, "kv_head": KV_HEADS, "layer": 1}


def rotate(x, positions, inv_freq=INV_FREQ):
    """RoPE in float64, x [H, n, D]."""
    angle = torch.as_tensor(positions).double()[:, None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    first, second = x.double().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Trace:
    """Keys on a dozen topics, and queries that ask for some topics often and for others seldom.

    Row b has its own tokens 0 .. lens[b] + steps - 1, the first lens[b] of them its prompt.
    """

    scale, units = SCALE, UNITS

    def __init__(self, *lens, steps, layers=1, seed=0, kv_heads=KV_HEADS):
        self.lens, self.steps, self.layers = lens, steps, layers
        self.units = {**UNITS, "kv_head": kv_heads}
        shape, total = (layers, len(lens)), max(lens) + steps + SPARE
        generator = torch.Generator().manual_seed(seed)
        topics = torch.randn(*shape, kv_heads, 12, DIM, generator=generator)
        about = torch.randint(12, (*shape, kv_heads, total, 1), generator=generator)
        asked = torch.rand(*shape, HEADS, total, 1, generator=generator).pow(3).mul(12).long()
        noise = torch.randn(*shape, kv_heads, total, DIM, generator=generator)
        self.raw_k = topics.gather(3, about.expand(-1, -1, -1, -1, DIM)) + 0.7 * noise
        topics = topics.repeat_interleave(HEADS // kv_heads, 2)
        self.raw_q = 1.3 * topics.gather(3, asked.expand(-1, -1, -1, -1, DIM))
        self.v = torch.randn(*shape, kv_heads, total, DIM, generator=generator)
        self.q, self.k = (rotate(x, range(total)).float() for x in (self.raw_q, self.raw_k))

    def fill(self, cache, counts=None, seen=None):
        """The next `counts` tokens of the rows, left-padded, in one go; by default the prompts."""
        counts = self.lens if counts is None else counts
        seen = [0] * len(self.lens) if seen is None else seen
        width = max(counts)
        valid = torch.stack([torch.arange(width) >= width - n for n in counts])
        for layer in cache.layers:
            padded = []
            for x in (self.q, self.k, self.v):
                padded.append(x.new_full((len(counts), x.shape[2], width, x.shape[-1]), 30.0))
                for row, (n, first) in enumerate(zip(counts, seen, strict=True)):
                    part = x[layer.position, row, :, first : first + n]
                    padded[-1][row, :, width - n :] = part
            q, k, v = padded
            layer.append(k, v, None if valid.all() else valid)
            cache.prefill(layer, q, self.scale)

    def decode(self, cache, step, rows=None, extra=0):
        """One step of all layers: outputs [layers, B, Hq, D]."""
        rows = torch.arange(len(self.lens)) if rows is None else rows
        place = torch.tensor(self.lens)[rows] + step + extra
        outputs = []
        for layer in cache.layers:
            q, k, v = (x[layer.position][rows, :, place] for x in (self.q, self.k, self.v))
            layer.append(k[:, :, None], v[:, :, None])
            outputs.append(cache.attend(layer, q, self.scale))
        return torch.stack(outputs)

    def run(self, cache):
        """Outputs of all steps: [steps, layers, B, Hq, D]."""
        self.fill(cache)
        return torch.stack([self.decode(cache, step) for step in range(self.steps)])


def new_cache(method, layers=1):
    return KVCache(method, layers, inv_freq=INV_FREQ)


class Slow:
    """One unit of one row and layer, step by step: its tokens in the order of the text."""

    num_recent = 0

    def __init__(self, method, trace, layer, row, unit, start=0):
        size = HEADS // trace.units[method.unit]
        heads = slice(unit * size, unit * size + size)
        self.method, self.t = method, start
        self.q, self.raw_q = (x[layer, row, heads].double() for x in (trace.q, trace.raw_q))
        self.k, self.raw_k, self.v = (
            x[layer, row].repeat_interleave(HEADS // x.shape[2], 0)[heads].double()
            for x in (trace.k, trace.raw_k, trace.v)
        )
        self.prompt = self.seen = trace.lens[row]
        self.kept = torch.arange(self.seen)
        self.notes = {}
        self.begin()

    def begin(self):
        pass

    def observe(self, probs):
        pass

    def score(self):
        raise NotImplementedError

    def logits(self):
        return torch.einsum("hd,htd->ht", self.q[:, self.seen - 1], self.k[:, self.kept]) * SCALE

    def extend(self, count):
        """More tokens at once, as a second turn brings them."""
        self.kept = torch.cat([self.kept, self.seen + torch.arange(count)])
        self.seen += count

    def step(self):
        self.t += 1
        self.kept = torch.cat([self.kept, torch.tensor([self.seen])])
        self.seen += 1
        probs = self.logits().softmax(-1)
        self.observe(probs)
        out = torch.einsum("ht,htd->hd", probs, self.v[:, self.kept])
        self.gone = 0
        if self.t % self.method.window == 0:
            self.evict()
        return out.float()

    def evict(self):
        size = self.method.budget
        if self.method.keep_prompt:
            size = max(size, self.prompt + self.num_recent)
        self.gone = max(len(self.kept) - size, 0)
        if not self.gone:
            return
        score = self.score().tolist()
        candidates = [
            i
            for i, position in enumerate(self.kept.tolist()[: len(self.kept) - self.num_recent])
            if not (self.method.keep_prompt and position < self.prompt)
        ]
        ranking = sorted(candidates, key=lambda i: (score[i], i))  # a tie goes against the older
        victims = set(ranking[: self.gone])
        stay = [i for i in range(len(self.kept)) if i not in victims]
        self.kept = self.kept[stay]
        self.notes = {name: note[stay] for name, note in self.notes.items()}


class SlowRecurrence(Slow):
    def begin(self):
        self.notes["last_hit"] = torch.full((self.seen,), self.t)
        self.notes["longest"] = torch.zeros(self.seen, dtype=torch.long)

    def extend(self, count):
        super().extend(count)
        fresh = torch.full((count,), self.t), torch.zeros(count, dtype=torch.long)
        for name, more in zip(("last_hit", "longest"), fresh, strict=True):
            self.notes[name] = torch.cat([self.notes[name], more])

    def observe(self, probs):
        last = torch.cat([self.notes["last_hit"], torch.tensor([self.t - 1])])
        longest = torch.cat([self.notes["longest"], torch.tensor([0])])
        hit = (probs >= self.method.threshold).any(0)
        gap = torch.where(hit, self.t - last, 0)
        self.notes["last_hit"] = torch.where(hit, self.t, last)
        self.notes["longest"] = torch.maximum(longest, gap)


class SlowLazy(SlowRecurrence):
    @property
    def num_recent(self):
        return self.method.window

    def score(self):
        silences = (self.t - self.notes["last_hit"]).tolist()
        pairs = zip(silences, self.notes["longest"].tolist(), strict=True)
        scores = torch.tensor([self.worth(*pair) for pair in pairs])  # in fp32
        return torch.where(self.kept < self.method.sinks, torch.inf, scores)

    def worth(self, silence, longest):
        if self.method.h1 == "patient":
            h1 = self.falling(silence / max(longest, self.method.budget / 4)) if longest else 0.0
            return h1 * (1 + self.falling(longest - 1)) if longest else h1
        if self.method.h1 == "code":
            h1 = self.falling(1 + silence / (longest + 1e-5))
        else:
            h1 = self.falling(silence / longest) if longest else 0.0
        return h1 + self.falling(longest - 1) if longest else h1

    @staticmethod
    def falling(x):
        return 2 / (1 + math.exp(min(x, 700.0)))


class SlowRaaS(SlowRecurrence):
    num_recent = 1

    def score(self):
        return self.notes["last_hit"]


class SlowH2O(Slow):
    @property
    def num_recent(self):
        return self.method.num_recent

    def begin(self):
        self.notes["total"] = self.sums(self.seen)

    def extend(self, count):
        super().extend(count)
        old = torch.nn.functional.pad(self.notes["total"], (0, count))
        self.notes["total"] = old + self.sums(count)

    def sums(self, count):
        """What the newest `count` queries give to each token, causally."""
        own = torch.arange(self.seen - count, self.seen)
        logits = self.q[:, own] @ self.k[:, self.kept].transpose(1, 2) * SCALE
        logits = logits.masked_fill(self.kept > own[:, None], -torch.inf)
        return logits.softmax(-1).sum((0, 1))

    def observe(self, probs):
        total = torch.cat([self.notes["total"], torch.zeros(1, dtype=torch.float64)])
        self.notes["total"] = total + probs.sum(0)

    def score(self):
        return self.notes["total"]


class SlowTOVA(Slow):
    def observe(self, probs):
        self.latest = probs.mean(0)

    def score(self):
        return self.latest


class SlowRecency(Slow):
    def score(self):
        return self.kept


class SlowSnapKV(Slow):
    @property
    def num_recent(self):
        return self.method.recent

    def importance(self):
        recent = self.method.recent
        queries = self.q[:, max(self.seen - recent, 0) : self.seen]
        logits = (queries @ self.k[:, self.kept].transpose(1, 2)).amax(0) * SCALE  # [w, m]
        older = self.kept < self.seen - recent
        probs = logits.masked_fill(~older, -torch.inf).softmax(-1).mean(0)
        half = self.method.kernel // 2
        return torch.stack(
            [probs[max(i - half, 0) : i + half + 1].max() for i in range(len(probs))]
        )

    def score(self):
        return self.importance()


class SlowRKV(SlowSnapKV):
    def score(self):
        redundancy = []
        for keys in self.k[:, self.kept]:
            keys = keys / keys.norm(dim=-1, keepdim=True)
            cosine = (keys @ keys.T).fill_diagonal_(0.0)
            for j in range(len(keys)):
                similar = (cosine[j] > self.method.similar).nonzero()
                if len(similar):
                    cosine[j, similar[-1]] = 0.0
            redundancy.append(cosine.mean(0).softmax(0))
        trade = self.method.trade_off
        return trade * self.importance() - (1 - trade) * torch.stack(redundancy).mean(0)


class SlowLagKV(Slow):
    @property
    def num_recent(self):
        return 2 * self.method.partition - 1

    def score(self):
        size, sinks = self.method.partition, self.method.sinks
        scores = torch.full((self.seen,), torch.inf)
        for begin in range(sinks, self.seen - 2 * size + 1, size):
            total = 0.0
            for x in (self.k, self.v):  # [heads, total, D]
                now, lag = x[:, begin : begin + size], x[:, begin + size : begin + 2 * size]
                low, high = lag.amin(1, keepdim=True), lag.amax(1, keepdim=True)
                spread = (now - low) / (high - low).clamp(min=1e-6)
                total = total + spread.std(-1).softmax(-1).mean(0)
            order = total.round(decimals=9).argsort(stable=True)  # ties: the older is worth less
            scores[begin : begin + size] = order.argsort().float()
        return scores[self.kept]


class SlowStreaming(SlowRecency):
    """The official form: all keys rotated anew for their places in the cache."""

    def logits(self):
        place = torch.arange(len(self.kept))
        keys = rotate(self.raw_k[:, self.kept], place)
        query = rotate(self.raw_q[:, self.seen - 1 : self.seen], place[-1:])
        return (query @ keys.transpose(1, 2))[:, 0] * SCALE

    def score(self):
        return torch.where(self.kept < self.method.sinks, torch.inf, self.kept.float())


class SlowInfinite(SlowStreaming):
    """The first tokens at a limited distance; before anything is out of reach, all as it is."""

    def logits(self):
        distance = self.seen - 1 - self.kept
        if self.seen > self.method.budget:
            limited = distance.clamp(max=self.method.budget - self.method.sinks)
            distance = torch.where(self.kept < self.method.sinks, limited, distance)
        keys = rotate(self.raw_k[:, self.kept], -distance)
        query = self.raw_q[:, self.seen - 1 : self.seen]
        return (query @ keys.transpose(1, 2))[:, 0] * SCALE


def assert_follows(method, trace, slow, *, notes=(), start=0, turn=None):
    """Decode with a method beside its slow reading; returns how many tokens each event evicted.

    turn: (step, [tokens per row]) of a second turn.
    """
    cache = new_cache(method, trace.layers)
    cache.steps = start
    units = trace.units[method.unit]
    sets = {
        (layer, row, unit): slow(method, trace, layer, row, unit, start)
        for layer in range(trace.layers)
        for row in range(len(trace.lens))
        for unit in range(units)
    }
    trace.fill(cache)
    events, extra = [], 0
    for step in range(trace.steps):
        if turn is not None and step == turn[0]:
            trace.fill(cache, turn[1], [n + step for n in trace.lens])
            for (_, row, _), one in sets.items():
                one.extend(turn[1][row])
            extra = torch.tensor(turn[1])
        got = trace.decode(cache, step, extra=extra).unflatten(2, (units, -1))
        for (layer, row, unit), one in sets.items():
            out, where = one.step(), f"step {step}, layer {layer}, row {row}, unit {unit}"
            torch.testing.assert_close(
                got[layer, row, unit], out, rtol=1e-4, atol=2e-5, msg=lambda m, w=where: f"{w}: {m}"
            )
            kept = cache.layers[layer]
            length = int(kept.seq_lens[row])
            assert length == len(one.kept), where
            if one.gone:
                events.append(one.gone)
                order = kept.slots["position"][row, unit, :length].argsort()
                for name in ("position", *notes):
                    slots = kept.slots[name][row, unit, :length][order]
                    want = one.kept if name == "position" else one.notes[name]
                    assert slots.tolist() == want.tolist(), f"{name}, {where}"
    assert events, "nothing was evicted"
    return events
