"""Eviction methods against slow readings of their rules: the same tokens stay, the same outputs."""

import copy

import pytest
import torch

from kvcomp import (
    H2O,
    METHODS,
    RKV,
    TOVA,
    LagKV,
    LazyEviction,
    LMInfinite,
    RaaS,
    RandomEviction,
    RecencyWindow,
    SnapKV,
    StreamingLLM,
)
from kvcomp.methods.eviction import Eviction
from slow.eviction import (
    KV_HEADS,
    UNITS,
    SlowH2O,
    SlowInfinite,
    SlowLagKV,
    SlowLazy,
    SlowRaaS,
    SlowRecency,
    SlowRKV,
    SlowSnapKV,
    SlowStreaming,
    SlowTOVA,
    Trace,
    assert_follows,
    new_cache,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EVICTIONS = [name for name, method in METHODS.items() if issubclass(method, Eviction)]

# LazyEviction, step by step.

LAZY = {  # budget, window, prompts, steps
    "few-first": (40, 7, (23, 9), 90),
    "long-prompt": (48, 20, (90, 61), 84),
    "odd": (60, 33, (30, 58), 140),
    "two-words": (100, 64, (70, 20), 200),
    "long-and-short": (96, 70, (130, 50), 215),
}


@pytest.mark.parametrize(
    "unit, h1",
    [("query_head", "code"), ("query_head", "paper"), ("kv_head", "patient"), ("layer", "patient")],
)
@pytest.mark.parametrize("case", LAZY)
def test_lazy_eviction_follows_its_rule(case, unit, h1, poisoned_outputs):
    budget, window, lens, steps = LAZY[case]
    method = LazyEviction(budget=budget, window=window, alpha=0.02, unit=unit, h1=h1)
    trace = Trace(*lens, steps=steps, layers=2 if unit == "kv_head" else 1)
    events = assert_follows(method, trace, SlowLazy, notes=("last_hit", "longest"))
    if case == "few-first":
        assert min(events) < window
    if case.startswith("long"):
        assert max(events) > window


@pytest.mark.parametrize("start", [2040, 65_530, 2**24 - 9])
def test_lazy_eviction_counts_past_what_half_floats_hold(start):
    method = LazyEviction(budget=40, window=9, alpha=0.02, unit="query_head")
    trace = Trace(44, 30, steps=50)
    assert_follows(method, trace, SlowLazy, notes=("last_hit", "longest"), start=start)


def test_lazy_eviction_can_keep_the_prompt():
    method = LazyEviction(budget=40, window=9, alpha=0.02, keep_prompt=True)
    assert_follows(method, Trace(60, 20, 36, steps=75), SlowLazy, notes=("last_hit", "longest"))


def test_lazy_eviction_can_keep_the_first_tokens():
    method = LazyEviction(budget=40, window=9, alpha=0.02, sinks=5)
    assert_follows(method, Trace(60, 20, 36, steps=75), SlowLazy, notes=("last_hit", "longest"))


def test_lazy_eviction_without_an_alpha_takes_an_even_share():
    assert LazyEviction(budget=50, window=9).threshold == 1 / 50
    method = LazyEviction(budget=50, window=9)
    assert_follows(method, Trace(60, 20, 36, steps=75), SlowLazy, notes=("last_hit", "longest"))


# The baselines against their docstrings.

BASELINES = {
    "h2o": (H2O(budget=30), SlowH2O, ("total",)),
    "h2o-query-head": (H2O(budget=30, unit="query_head", window=4, recent=3), SlowH2O, ("total",)),
    "tova": (TOVA(budget=30), SlowTOVA, ()),
    "tova-lagged": (TOVA(budget=30, window=5, unit="kv_head"), SlowTOVA, ()),
    "raas": (RaaS(budget=30, alpha=0.02), SlowRaaS, ("last_hit",)),
    "raas-free": (RaaS(budget=30, alpha=0.02, keep_prompt=False), SlowRaaS, ("last_hit",)),
    "raas-lagged": (RaaS(budget=46, alpha=0.02, window=6, unit="layer"), SlowRaaS, ("last_hit",)),
    "recency": (RecencyWindow(budget=30), SlowRecency, ()),
    "recency-lagged": (RecencyWindow(budget=30, window=7, unit="kv_head"), SlowRecency, ()),
    "snapkv": (SnapKV(budget=30, window=10), SlowSnapKV, ()),
    "snapkv-every-step": (SnapKV(budget=30, window=1, unit="query_head"), SlowSnapKV, ()),
    "snapkv-layer": (SnapKV(budget=30, window=5, unit="layer", recent=3), SlowSnapKV, ()),
    "r-kv": (RKV(budget=30, window=10, similar=0.6), SlowRKV, ()),
    "r-kv-layer": (RKV(budget=30, window=3, unit="layer", trade_off=0.5), SlowRKV, ()),
    "lagkv": (LagKV(budget=30, window=8, partition=6, sinks=2), SlowLagKV, ()),
    "lagkv-query-head": (
        LagKV(budget=30, window=3, partition=4, sinks=0, unit="query_head"),
        SlowLagKV,
        (),
    ),
    "lagkv-layer": (LagKV(budget=30, window=1, partition=5, unit="layer"), SlowLagKV, ()),
    "streaming-llm": (StreamingLLM(budget=20), SlowStreaming, ()),
    "streaming-llm-lagged": (StreamingLLM(budget=20, window=8), SlowStreaming, ()),
    "streaming-llm-no-sinks": (StreamingLLM(budget=20, sinks=0), SlowStreaming, ()),
    "lm-infinite": (LMInfinite(budget=24, sinks=6), SlowInfinite, ()),
    "lm-infinite-lagged": (LMInfinite(budget=24, sinks=6, window=5), SlowInfinite, ()),
}


@pytest.mark.parametrize(
    "lens, kv_heads", [((45, 22), 2), ((26, 1), 2), ((45, 22), 1)], ids=["long", "short", "one"]
)
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_does_what_it_says(name, lens, kv_heads, poisoned_outputs):
    method, slow, notes = BASELINES[name]
    trace = Trace(*lens, steps=40, seed=1, kv_heads=kv_heads)
    notes = () if "total" in notes else notes  # sums agree to rounding, and the tokens exactly
    assert_follows(method, trace, slow, notes=notes)


def test_random_eviction_repeats_itself_and_only_itself():
    trace = Trace(40, 12, steps=30)

    def kept(seed):
        cache = new_cache(RandomEviction(budget=24, recent=6, seed=seed))
        out = trace.run(cache)
        return cache.layers[0].slots["position"].tolist(), out

    (first, out), (second, again), (other, _) = kept(3), kept(3), kept(4)
    assert first == second and torch.equal(out, again)
    assert first != other


# What holds for all of them.


def make(name, budget, window, **fields):
    sizes = {"lagkv": {"partition": 4, "sinks": 1}, "random-eviction": {"recent": 8}}
    return METHODS[name](budget=budget, window=window, **sizes.get(name, {}), **fields)


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("name", EVICTIONS)
def test_what_stays_is_bounded_recent_and_intact(name, window, poisoned_outputs):
    method = make(name, 24, window)
    trace = Trace(40, 9, 21, steps=80)
    cache, layer = (cache := new_cache(method)), cache.layers[0]
    trace.fill(cache)
    prompts = torch.tensor(trace.lens)
    bound = torch.full_like(prompts, 24)
    if method.keep_prompt:
        bound = torch.maximum(bound, prompts + method.num_recent)
    length = prompts
    for step in range(trace.steps):
        assert trace.decode(cache, step).isfinite().all()
        length = length + 1
        if (step + 1) % window == 0:
            length = torch.minimum(length, bound)
        assert layer.seq_lens.tolist() == length.tolist(), step
        if (step + 1) % window or "position" not in layer.slots:
            continue
        for row, seen in enumerate((prompts + step + 1).tolist()):
            for unit, slots in enumerate(layer.slots["position"][row, :, : length[row]]):
                kept = slots.tolist()
                assert len(set(kept)) == len(kept) and set(kept) <= set(range(seen))
                assert set(range(max(seen - method.num_recent, 0), seen)) <= set(kept)
                if method.keep_prompt:
                    assert set(range(trace.lens[row])) <= set(kept)
                size = layer.keys.shape[1] // UNITS[method.unit]
                heads = slice(unit * size, unit * size + size)
                k, v = layer.keys[row, heads], layer.values[row, heads]
                unmoved = slice(getattr(method, "sinks", 0), len(kept))
                assert torch.equal(v[:, : len(kept)], trace.v[0, row, heads, kept])
                assert torch.equal(k[:, unmoved], trace.k[0, row, heads, kept[unmoved]])
    assert length.tolist() == bound.tolist()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", EVICTIONS)
def test_a_budget_that_covers_everything_is_dense(name, unit):
    trace = Trace(30, 17, steps=50, layers=2)
    dense = trace.run(new_cache(METHODS["full"](), 2))
    for window in (1, 11):
        got = trace.run(new_cache(make(name, 80, window, unit=unit), 2))
        assert torch.equal(got, dense)


@pytest.mark.parametrize("budget", [79, 80])
def test_lm_infinite_is_dense_up_to_its_budget(budget):
    trace = Trace(30, 17, steps=50)
    dense = trace.run(new_cache(METHODS["full"]()))
    got = trace.run(new_cache(LMInfinite(budget=budget)))
    assert torch.equal(got[:49], dense[:49])
    assert torch.equal(got[:, :, 1], dense[:, :, 1])
    assert torch.equal(got[49], dense[49]) == (budget == 80)


def kept_tokens(layer):
    lens = enumerate(layer.seq_lens.tolist())
    return [layer.slots["position"][row, :, :n].sort(-1)[0].tolist() for row, n in lens]


SCORED = ["lazy-eviction", "h2o", "tova", "raas", "snapkv", "r-kv", "lagkv"]


@pytest.mark.parametrize("name", SCORED)
def test_where_slots_lie_does_not_matter(name):
    method = make(name, 30, 6, unit="kv_head", keep_prompt=False)
    trace = Trace(40, 25, steps=40)
    caches = [new_cache(method), new_cache(method)]
    for cache in caches:
        trace.fill(cache)
    for step in range(trace.steps):
        straight, shuffled = (trace.decode(cache, step) for cache in caches)
        torch.testing.assert_close(shuffled, straight, rtol=1e-4, atol=1e-5)
        layer = caches[1].layers[0]
        if (step + 1) % 6 or "position" not in layer.slots:
            continue
        assert kept_tokens(layer) == kept_tokens(caches[0].layers[0])
        for row, count in enumerate(layer.seq_lens.tolist()):
            for unit in range(KV_HEADS):
                order = torch.randperm(count)
                for x in (layer.keys, layer.values, *layer.slots.values()):
                    x[row, unit, :count] = x[row, unit, :count][order].clone()


@pytest.mark.parametrize("name", [name for name in EVICTIONS if name != "random-eviction"])
def test_rows_move_with_all_that_is_known_about_them(name):
    method = make(name, 24, 9)
    trace = Trace(40, 9, 25, steps=44, layers=2)
    rows = torch.tensor([2, 2, 0])
    still, moving = new_cache(method, 2), new_cache(method, 2)
    for cache in (still, moving):
        trace.fill(cache)
    for step in range(trace.steps):
        want = trace.decode(still, step)
        if step == 23:  # four steps after an eviction
            moving.select(rows)
        if step < 23:
            trace.decode(moving, step)
        else:
            got = trace.decode(moving, step, rows)
            torch.testing.assert_close(got, want[:, rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVICTIONS)
def test_reset_forgets(name):
    trace = Trace(40, 12, steps=30)
    cache = new_cache(make(name, 24, 5))
    first = trace.run(cache)
    cache.reset()
    assert cache.layers[0].capacity == 0
    assert torch.equal(trace.run(cache), first)


@pytest.mark.parametrize("name", EVICTIONS)
def test_a_copied_cache_goes_on_by_itself(name):
    trace = Trace(40, 12, steps=30)
    cache = new_cache(make(name, 24, 7))
    trace.fill(cache)
    for step in range(16):
        trace.decode(cache, step)
    copied = copy.deepcopy(cache)
    rest = [[trace.decode(c, step) for step in range(16, 30)] for c in (cache, copied)]
    assert torch.equal(torch.stack(rest[0]), torch.stack(rest[1]))


@pytest.mark.parametrize("name", EVICTIONS)
def test_crop_is_refused(name):
    trace = Trace(12, 10, steps=4)
    cache = new_cache(make(name, 24, 5))
    trace.run(cache)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(1)
    assert cache.layers[0].seq_lens.tolist() == [16, 14]


# A second turn, a prompt in chunks.

TURNS = {
    "lazy-eviction": (LazyEviction(budget=40, window=7, alpha=0.02), SlowLazy),
    "lazy-eviction-query-head": (
        LazyEviction(budget=40, window=12, alpha=0.02, unit="query_head"),
        SlowLazy,
    ),
    "raas": (RaaS(budget=40, alpha=0.02, window=6), SlowRaaS),
    "h2o": (H2O(budget=40, window=4), SlowH2O),
    "tova": (TOVA(budget=40, window=3), SlowTOVA),
    "snapkv": (SnapKV(budget=40, window=6), SlowSnapKV),
    "lagkv": (LagKV(budget=40, window=6, partition=6, sinks=2), SlowLagKV),
}


@pytest.mark.parametrize("counts", [(20, 20), (3, 20)], ids=["even", "padded"])
@pytest.mark.parametrize("name", TURNS)
def test_a_second_turn_over_an_evicted_cache(name, counts):
    method, slow = TURNS[name]
    trace = Trace(34, 30, steps=60)
    notes = ("last_hit", "longest") if slow is SlowLazy else ()
    assert_follows(method, trace, slow, notes=notes, turn=(29, counts))


@pytest.mark.parametrize("name", EVICTIONS)
def test_a_prompt_in_chunks_is_one_prompt(name):
    method = make(name, 24, 1, keep_prompt=name not in ("streaming-llm", "lm-infinite"))
    trace = Trace(40, 40, steps=20)
    whole, chunked = new_cache(method), new_cache(method)
    trace.fill(whole)
    for first in range(0, 40, 8):
        trace.fill(chunked, (8, 8), (first, first))
    for step in range(trace.steps):
        got, want = trace.decode(chunked, step), trace.decode(whole, step)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert chunked.layers[0].capacity <= whole.layers[0].capacity
