"""Retrieval methods against slow readings of their rules: what is resident, what is in the pool."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from kvcomp import METHODS, LouisKV, PerTokenRetrieval, reasoner
from kvcomp.cache import host_pool, slab, unit_index
from kvcomp.methods.retrieval import Retrieval
from retrieval_examples import FIELDS, SMALL, louis, make
from slow.eviction import DIM, KV_HEADS, new_cache
from slow.retrieval import SLOW
from slow.retrieval_check import assert_follows
from slow.retrieval_traces import Recorded, Recorder, Walk

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_retrieval_method_has_a_slow_reading():
    assert set(SLOW) == {name for name, m in METHODS.items() if issubclass(m, Retrieval)}


# The rules, step by step.


@pytest.mark.parametrize("name", SLOW)
def test_does_what_it_says(name, poisoned_outputs):
    trace = Walk(60, 9, 31, steps=36)
    slow, _ = assert_follows(make(name), trace)
    assert sum(one.fetched for one in slow[0]) > 100
    if name == "louis-kv":  # rows decide for themselves
        assert len({one.retrievals for one in slow[0]}) > 1


CORNERS = {  # fields, prompts
    "no-sinks-nothing-newest": ({"sinks": 0, "newest": 0}, (40, 14)),
    "nothing-newest": ({"newest": 0}, (40, 14)),
    "no-sinks": ({"sinks": 0}, (40, 1)),
    "only-sinks": ({}, (3, 3)),
    "fewer-than-sinks": ({}, (40, 1, 2)),
    "far-fewer-than-sinks": ({"sinks": 8, "local": 4, "newest": 3}, (1, 5, 12)),
    "one-more-than-sinks": ({}, (40, 4)),
    "shorter-than-sinks-and-newest": ({}, (8, 7)),
    "sinks-and-newest": ({}, (9, 9)),
    "sinks-newest-and-one": ({}, (10, 9)),
    "all-is-one": (
        {"sinks": 0, "local": 1, "budget": 1, "segment": (1, 1), "cluster_size": 1, "newest": 1},
        (20, 3),
    ),
    "segments-of-one": ({"segment": (1, 1)}, (20, 9)),
    "segments-of-three": ({"segment": (3, 3)}, (20, 9)),
    "one-local": ({"local": 1, "newest": 1}, (20, 9)),
    "long-segments": ({"local": 2, "newest": 2, "segment": (2, 20)}, (20, 9)),
    "windows": ({"window": 8}, (47, 24)),
    "window-of-a-cluster": ({"window": 4}, (30, 24)),
    "one-cluster": ({"cluster_size": 100, "window": 100}, (40, 24)),
    "always": ({"tau": 2.0}, (30, 12)),
    "never": ({"tau": -1.0}, (30, 12)),
    "triggers-without-cuts": ({"tau": 2.0, "segment": (7, 7)}, (30, 12)),
    "a-budget-for-all": ({"budget": 200}, (30, 12)),
    "a-budget-below-a-unit": (
        {"budget": 4, "sinks": 1, "local": 3, "newest": 3, "cluster_size": 30, "window": 99},
        (40, 25),
    ),
}


@pytest.mark.parametrize("case", CORNERS)
def test_louis_kv_in_corners(case):
    fields, lens = CORNERS[case]
    slow, _ = assert_follows(louis(**fields), Walk(*lens, steps=26, seed=3))
    if case == "windows":
        assert len(slow[0][0].units[0]) > 8


@pytest.mark.parametrize("name", ["cluster-kv", "quest", "arkvale", "free-kv"])
@pytest.mark.parametrize("lens", [(3, 4), (20, 10), (1, 2, 30)], ids=str)
def test_short_prompts(name, lens):
    assert_follows(make(name), Walk(*lens, steps=22, seed=2))


@pytest.mark.parametrize("name", ["louis-kv", "quest"])
def test_ties_go_to_the_earlier_unit(name):
    trace = Walk(40, 23, steps=24)
    trace.k = torch.ones_like(trace.k)
    assert_follows(make(name), trace)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["louis-kv", "cluster-kv", "free-kv", "arkvale"])
def test_half_floats(name, dtype):
    assert_follows(make(name), Walk(45, 20, steps=24, seed=6, dtype=dtype))


@pytest.mark.parametrize("name", SLOW)
def test_keys_and_values_of_unlike_sizes(name, poisoned_outputs):
    """192 and 128 columns, as in MiMo-V2-Flash: in the pool, on the device and in a second turn."""
    trace = Walk(45, 20, steps=24, seed=6)
    trace.q, trace.k = (
        x.repeat(1, 1, 1, 1, 192 // DIM) * (DIM / 192) ** 0.5 for x in (trace.q, trace.k)
    )
    trace.v = torch.randn(*trace.v.shape[:-1], 128, generator=torch.Generator().manual_seed(6))
    _, cache = assert_follows(make(name), trace)
    pools = [layer.hosted.pool for layer in cache.layers]
    assert all(pool.blocks[0].shape[-1] == 192 + 128 for pool in pools)


@pytest.mark.parametrize("name", SLOW)
def test_what_is_small_grows(name, monkeypatch, poisoned_outputs):
    """Pools of several blocks, an index and a slab that are enlarged, and no larger than said."""
    monkeypatch.setattr(host_pool, "FIRST_ROWS", 5)
    monkeypatch.setattr(host_pool, "GROWTH", 0.1)
    monkeypatch.setattr(unit_index, "FIRST_UNITS", 1)
    monkeypatch.setattr(unit_index, "GROWTH", 1.01)
    monkeypatch.setattr(slab, "FIRST_CAPACITY", 1)
    method = make(name)
    _, cache = assert_follows(method, Walk(24, 11, steps=36, layers=2, seed=4))
    for layer in cache.layers:
        assert len(layer.hosted.pool.blocks) > 3
        assert layer.capacity <= method.most_resident
    assert cache.meter.peak_host_bytes == cache.state.memory.used


@pytest.mark.parametrize("counts", [(12, 5), (0, 7), (3, 1)], ids=str)
@pytest.mark.parametrize("name", SLOW)
def test_a_second_turn(name, counts):
    assert_follows(make(name), Walk(30, 17, steps=22, seed=5), turn=(9, counts))


@pytest.mark.parametrize("counts", [(12, 1), (0, 7), (1, 0)], ids=str)
@pytest.mark.parametrize("step", [0, 1, 9])
@pytest.mark.parametrize("name", SLOW)
def test_a_second_turn_of_rows_that_lack_sinks(name, step, counts):
    trace = Walk(1, 2, steps=22, seed=5)
    assert_follows(make(name, sinks=6, local=6), trace, turn=(step, counts))


@pytest.mark.parametrize("name", SLOW)
def test_pieces_of_which_the_first_is_all_padding(name):
    """One row has nothing in it, then less than the sinks; the pieces are one prompt in the end."""
    method, trace = make(name, sinks=5), Walk(29, 9, steps=16)
    cache, whole = new_cache(method), new_cache(method)
    trace.fill(whole)
    for counts, seen in (((10, 0), (0, 0)), ((10, 2), (10, 0)), ((9, 7), (20, 2))):
        trace.fill(cache, counts, seen)
    for layer in cache.layers:
        _, lens = method.context(layer)
        layer.settle()
        assert layer.logical_lens.tolist() == [29, 9] and lens.tolist() == [29, 9]
    for step in range(trace.steps):
        assert trace.decode(cache, step).isfinite().all()
    for a, b in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(a.logical_lens, b.logical_lens + trace.steps)


@pytest.mark.parametrize("name", SLOW)
def test_rows_that_lack_sinks_go_back_to_their_prompt(name):
    method, trace = make(name, sinks=6, local=6), Walk(14, 2, steps=20)
    cache = new_cache(method)
    first = trace.run(cache)
    assert method.rewind(cache, 14) == 14
    again = torch.stack([trace.decode(cache, step) for step in range(trace.steps)])
    torch.testing.assert_close(again, first, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("step", [0, 13])
@pytest.mark.parametrize("name", SLOW)
def test_rows_move_with_all_that_is_known_about_them(name, step):
    trace = Walk(30, 9, 17, steps=24, layers=2, seed=5)
    assert_follows(make(name, dense_layers=1), trace, shuffle=(step, [2, 2, 0]))


@pytest.fixture(scope="module")
def thoughts():
    """What the reasoner's layers 1, 2 and 5 saw: two prompts, and their answers."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    problems = [reasoner.task.make_problem(nodes=12, steps=40, seed=seed) for seed in (1, 2)]
    ids = torch.stack([torch.tensor(tokenizer(p.prompt)["input_ids"]) for p in problems])
    recorder = Recorder()
    with kvcomp.patch(model, recorder):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=32,
            max_new_tokens=32,
            do_sample=False,
        )
    whole = Recorded.of(recorder, ids.shape[1])
    return Recorded(*(x[[1, 2, 5]] for x in (whole.q, whole.k, whole.v)), *whole.lens)


@pytest.mark.parametrize("name", SLOW)
def test_on_thoughts_of_the_reasoner(name, thoughts):
    tau = {"tau": 0.0} if "tau" in FIELDS[name] or name == "louis-kv" else {}
    slow, _ = assert_follows(make(name, budget=32, dense_layers=1, **tau), thoughts, steps=30)
    if name == "louis-kv":
        assert len({one.retrievals for of in slow for one in of}) > 1


# When LouisKV retrieves.


def test_tau_2_is_per_token_retrieval_bit_for_bit():
    trace = Walk(60, 9, 31, steps=50, layers=2)
    fields = {**SMALL, **FIELDS["louis-kv"], "tau": 2.0}
    caches = [new_cache(m(**fields), 2) for m in (LouisKV, PerTokenRetrieval)]
    first, second = (trace.run(cache) for cache in caches)
    assert torch.equal(first, second)
    assert caches[0].meter.retrievals == caches[1].meter.retrievals == [150, 150]
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.hosted.index.starts, b.hosted.index.starts)


@pytest.mark.parametrize("newest", [0, 6, 8])
def test_tau_minus_1_retrieves_only_when_forced(newest):
    steps, method = 60, louis(tau=-1.0, newest=newest)
    expected, closed, first_open = 0, [], 0
    if newest:  # as pieces of cluster_size
        closed = [min(4, newest - first) for first in range(0, newest, 4)]
    for step in range(steps):
        if first_open == 7:
            closed.append(7)
            first_open = 0
        if step == 0 or sum(closed) + first_open >= 8 + 7:
            expected += 1
            while closed and sum(closed) + first_open > 8:
                closed.pop(0)
        first_open += 1
    cache = new_cache(method)
    Walk(40, steps=steps).run(cache)
    assert cache.meter.retrievals == [expected]
    assert 1 < expected < steps / 6


# Rows, copies, repetition.


@pytest.mark.parametrize("name", SLOW)
def test_rows_of_a_batch_are_as_they_are_alone(name):
    lens, steps = (60, 9, 31), 40
    trace = Walk(*lens, steps=steps, layers=2)
    together = trace.run(new_cache(make(name, dense_layers=1), 2))
    for row, length in enumerate(lens):
        one = Walk(length, steps=steps, layers=2)
        one.q, one.k, one.v = (x[:, row : row + 1] for x in (trace.q, trace.k, trace.v))
        alone = one.run(new_cache(make(name, dense_layers=1), 2))
        assert torch.equal(alone[:, :, 0], together[:, :, row])


@pytest.mark.parametrize("name", SLOW)
def test_reset_forgets(name):
    trace, other = Walk(40, 12, steps=20, layers=2), Walk(55, steps=9, layers=2, seed=9)
    cache = new_cache(make(name), 2)
    first = trace.run(cache)
    cache.reset()
    assert cache.layers[0].capacity == 0 and not cache.layers[0].is_hosted
    assert cache.state.memory.used == 0
    other.run(cache)
    cache.reset()
    assert torch.equal(trace.run(cache), first)
    assert torch.equal(trace.run(new_cache(make(name), 2)), first)


@pytest.mark.parametrize("steps", [0, 16])
@pytest.mark.parametrize("name", SLOW)
def test_a_copied_cache_goes_on_by_itself(name, steps):
    trace, other = Walk(40, 12, steps=30), Walk(40, 12, steps=30, seed=8)
    cache = new_cache(make(name))
    trace.fill(cache)
    for step in range(steps):
        trace.decode(cache, step)
    copied, strayed = copy.deepcopy(cache), copy.deepcopy(cache)
    for step in range(steps, 30):
        other.decode(strayed, step)
    rest = [[trace.decode(c, step) for step in range(steps, 30)] for c in (cache, copied)]
    assert torch.equal(torch.stack(rest[0]), torch.stack(rest[1]))
    pool = copied.layers[0].hosted.pool
    assert copied.state.memory.used == cache.state.memory.used == pool.nbytes
    assert pool.memory is copied.state.memory is not cache.state.memory


@pytest.mark.parametrize("name", SLOW)
def test_a_budget_that_covers_everything_is_dense(name):
    trace = Walk(30, 17, steps=30, layers=2)
    dense = trace.run(new_cache(METHODS["full"](), 2))
    got = trace.run(new_cache(make(name, budget=80), 2))
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SLOW)
def test_a_further_turn_attends_to_all_there_ever_was(name):
    trace = Walk(40, 12, steps=30)
    cache, layer = (cache := new_cache(make(name))), cache.layers[0]
    trace.fill(cache)
    for step in range(19):
        trace.decode(cache, step)
    more = [x[0, :, :, 59:64] for x in (trace.k, trace.v)]
    layer.append(*more)
    (k, v, _), lens = cache.method.context(layer)
    assert lens.tolist() == [59 + 5, 31 + 5]
    for row, length in enumerate(lens.tolist()):
        for head in range(KV_HEADS):
            order = (k[row, head, :length, :1] == trace.k[0, row, head, :64, 0]).int().argmax(1)
            assert sorted(order[:-5].tolist()) == list(range(length - 5))
            assert order[-5:].tolist() == [59, 60, 61, 62, 63]
            assert torch.equal(k[row, head, :length], trace.k[0, row, head, order])
            assert torch.equal(v[row, head, :length], trace.v[0, row, head, order])
    assert not k[1, :, 36:].any() and not v[1, :, 36:].any()


@pytest.mark.parametrize("name", SLOW)
def test_crop_is_refused(name):
    cache = new_cache(make(name))
    Walk(12, 10, steps=2).run(cache)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(1)


# Parameters.


@pytest.mark.parametrize("budget", [8, 16, 64, 128, 1000])
@pytest.mark.parametrize("name", SLOW)
def test_examples_have_the_budget_on_the_device(name, budget):
    assert METHODS[name].example(budget).most_resident == budget
