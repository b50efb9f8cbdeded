"""Caches and methods under calls in any order: append, decode, crop, reorder, fork, reset.

Every token is marked in its values, exactly in 16 bits too, so that what a layer keeps can be held
against a list of what each row has seen, whatever a method does with the keys.
"""

from copy import deepcopy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcomp import METHODS
from kvcomp.cache import KVCache
from kvcomp.hf.attention import attend_many
from kvcomp.methods.eviction import Eviction
from kvcomp.methods.retrieval import Retrieval

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, KV_HEADS, DIM = 5, 4, 2, 32
INV_FREQ = 10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
SCALE = DIM**-0.5
BASE = 128  # of the two digits of a mark: exact in every dtype
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 6e-3}
EXAMPLES = {"full": 40, "delta": 40, "lazy-eviction": 40, "louis-kv": 40}  # of calls; others 15
STEPS = 14


class Machine(RuleBasedStateMachine):
    """One cache, and for each of its rows the tokens [(K, V)] of every layer that it has seen."""

    name: str

    @initialize(
        budget=st.integers(6, 20).map(lambda pages: 4 * pages),
        batch=st.integers(1, 3),
        dtype=st.sampled_from(list(TOLERANCES)),
        seed=st.integers(0, 2**16),
    )
    def begin(self, budget, batch, dtype, seed):
        self.method = METHODS[self.name].example(budget)
        self.kind, self.budget, self.dtype = type(self.method), budget, dtype
        self.cache = KVCache(self.method, LAYERS, inv_freq=INV_FREQ)
        self.generator = torch.Generator().manual_seed(seed)
        self.next_mark = 0
        self.forget(batch)

    def forget(self, batch):
        self.rows = [[] for _ in range(batch)]  # of (mark, K, V), K and V [layers, Hkv, D]
        self.columns = []  # which rows a column was a token of
        self.decoded = 0

    # --- what happens ---------------------------------------------------------------------------

    @precondition(lambda self: not self.columns)
    @rule(count=st.integers(17, 90), padding=st.lists(st.integers(0, 12), min_size=3, max_size=3))
    def prompt(self, count, padding):
        self.several(count, padding)

    @precondition(lambda self: self.columns and len(self.columns) < 400)
    @rule(count=st.integers(2, 20), padding=st.lists(st.integers(0, 1), min_size=3, max_size=3))
    def more(self, count, padding):
        self.several(count, padding)

    @precondition(lambda self: self.columns and len(self.columns) < 400)
    @rule(steps=st.integers(1, 12))
    def decode(self, steps):
        for _ in range(steps):
            q, k, v = self.tokens(1, None)
            seen = self.stacked()
            for layer in self.cache.layers:
                at = layer.position
                layer.append(k[at], v[at])
                kept = self.kept(layer) if issubclass(self.kind, Eviction) else None
                out = self.cache.attend(layer, q[at, :, :, 0], SCALE)
                self.check_attention(out, q[at, :, :, 0], seen[at] if kept is None else kept)
            self.decoded += len(self.rows)

    @precondition(lambda self: self.columns)
    @rule(share=st.floats(0, 1))
    def crop(self, share):
        count = int(share * (min(len(row) for row in self.rows) - 1))
        assume(count > 0)
        if not self.cache.method.croppable:
            with pytest.raises(ValueError, match="cannot take tokens back"):
                self.cache.crop(count)
            return
        self.cache.crop(count)
        for _ in range(count):
            for row, took in zip(self.rows, self.columns.pop(), strict=True):
                if took:
                    row.pop()

    @precondition(lambda self: self.columns)
    @rule(order=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def reorder(self, order):
        order = [row % len(self.rows) for row in order]
        self.cache.select(torch.tensor(order))
        self.rows = [list(self.rows[row]) for row in order]
        self.columns = [[took[row] for row in order] for took in self.columns]

    @precondition(lambda self: self.columns)
    @rule()
    def fork(self):
        """Go on with a copy; what happens to it must not reach what it was copied from."""
        original, self.cache = self.cache, deepcopy(self.cache)
        assert all(layer.cache is self.cache for layer in self.cache.layers)
        for layer in original.layers:
            layer.reset()

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.cache.reset()
        assert all(layer.capacity == 0 for layer in self.cache.layers)
        self.forget(batch)

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def lengths(self):
        lens = [len(row) for row in self.rows]
        for layer in self.cache.layers if self.columns else ():
            assert layer.columns == len(self.columns)
            assert layer.logical_lens.tolist() == lens
            kept = layer.seq_lens.tolist()
            assert max(kept) <= layer.max_len <= layer.capacity
            assert all(0 < n <= most for n, most in zip(kept, lens, strict=True))
            if not issubclass(self.kind, (Eviction, Retrieval)):
                assert kept == lens

    @invariant()
    def tokens_are_what_was_seen(self):
        """No token twice, none of another row, none that was never there, and V untouched."""
        for layer in self.cache.layers if self.columns else ():
            values = layer.values
            marks = (values[..., 0] + BASE * values[..., 1].float()).long()
            copies = values.shape[1] // KV_HEADS
            for row, known in enumerate(self.rows):
                by_mark = {mark: v for mark, _, v in known}
                for head in range(values.shape[1]):
                    kept = marks[row, head, : layer.seq_lens[row]].tolist()
                    assert len(set(kept)) == len(kept) and by_mark.keys() >= set(kept)
                    want = torch.stack(
                        [by_mark[mark][layer.position, head // copies] for mark in kept]
                    )
                    assert torch.equal(values[row, head, : len(kept)], want)

    @invariant()
    def counts(self):
        meter = self.cache.meter
        read = [int(n) for n in meter.read_tokens]
        assert all(n <= int(meter.dense_tokens) for n in read)

    # --- how ------------------------------------------------------------------------------------

    def several(self, count, padding):
        """A prompt, or a second turn: n tokens of each row, some of the first ones padding."""
        padding = padding[: len(self.rows)]
        valid = torch.tensor([[column >= n for column in range(count)] for n in padding])
        q, k, v = self.tokens(count, valid)
        valid = None if valid.all() else valid
        for layer in self.cache.layers:
            at, first = layer.position, layer.columns == 0
            layer.append(k[at], v[at], valid)
            if not first:
                out = attend_many(layer, q[at], valid, SCALE)
                assert out.isfinite().all()
                self.check_last(out[:, -1], q[at, :, :, -1], layer)
            self.cache.prefill(layer, q[at], SCALE)

    def tokens(self, count, valid):
        """q, K and V of new tokens, [layers, B, H, n, D], entered in the rows' lists."""
        batch = len(self.rows)

        def random(heads, scale=1.0):
            shape = (LAYERS, batch, heads, count, DIM)
            return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

        q, k, v = random(HEADS, 2.0), random(KV_HEADS), random(KV_HEADS)
        for column in range(count):
            took = [valid is None or bool(valid[row, column]) for row in range(batch)]
            for row, tokens in enumerate(self.rows):
                mark, self.next_mark = self.next_mark, self.next_mark + 1
                assert mark < BASE * BASE
                v[:, row, :, column, 0], v[:, row, :, column, 1] = mark % BASE, mark // BASE
                if took[row]:
                    tokens.append((mark, k[:, row, :, column], v[:, row, :, column]))
            self.columns.append(took)
        return q, k, v

    def stacked(self):
        """By layer and row: K and V [Hkv, n, D] of all that the row has seen."""
        rows = [
            [torch.stack(parts, 2) for parts in zip(*((k, v) for _, k, v in row), strict=True)]
            for row in self.rows
        ]
        return [[(k[layer], v[layer]) for k, v in rows] for layer in range(LAYERS)]

    def kept(self, layer):
        """By row: a copy of the K and V that the layer holds now."""
        lens = layer.seq_lens.tolist()
        return [
            (layer.keys[b, :, :n].clone(), layer.values[b, :, :n].clone())
            for b, n in enumerate(lens)
        ]

    def check_attention(self, out, q, rows):
        """Dense over `rows` where the method reads all of them, and finite in any case."""
        assert out.shape == q.shape and out.dtype == q.dtype and out.isfinite().all()
        for b, (k, v) in enumerate(rows):
            if k.shape[1] <= self.least_dense():
                torch.testing.assert_close(
                    out[b].float(), dense(q[b], k, v), **tolerance(self.dtype, v)
                )

    def check_last(self, out, q, layer):
        """The last of several new tokens attends to all that was seen, where nothing is gone."""
        if issubclass(self.kind, Eviction):
            return
        for b, (k, v) in enumerate(self.stacked()[layer.position]):
            torch.testing.assert_close(
                out[b].float(), dense(q[b], k, v), **tolerance(self.dtype, v)
            )

    def least_dense(self):
        """Tokens up to which the method attends to everything."""
        if self.name == "lm-infinite" or issubclass(self.kind, Retrieval):
            return 0  # it moves keys as it attends; or what it attends to has another order
        if self.name in ("full", "delethink") or issubclass(self.kind, Eviction):
            return 10**9  # of what is kept
        return self.budget


def dense(q, k, v):
    """softmax(q k^T) v of one row in fp64: q [Hq, D], K and V [Hkv or Hq, n, D]."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    probs = (torch.einsum("hd,hnd->hn", q.double(), k) * SCALE).softmax(-1)
    return torch.einsum("hn,hnd->hd", probs, v).float()


def tolerance(dtype, v):
    """The marks are large numbers: what rounding does grows with them."""
    return {
        "rtol": TOLERANCES[dtype],
        "atol": TOLERANCES[dtype] * (1 + 0.05 * float(v.abs().max())),
    }


@pytest.mark.parametrize("name", METHODS)
def test_any_order_of_calls(name, monkeypatch):
    monkeypatch.setattr("kvcomp.cache.slab.TOKEN_ROW", 4 * KV_HEADS * DIM)  # in fp32 and not in 16
    run_state_machine_as_test(
        type("AnyOrder", (Machine,), {"name": name}),
        settings=settings(
            max_examples=EXAMPLES.get(name, 15),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
