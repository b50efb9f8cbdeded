"""What retrieval methods are tried on: queries that dwell and turn, or those of a model."""

from __future__ import annotations

import torch

from kvcomp.methods import Method
from slow.eviction import DIM, HEADS, SPARE, Trace, rotate


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
