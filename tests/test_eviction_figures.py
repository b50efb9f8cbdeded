"""What eviction reports, the memory it takes, and the settings it was published with."""

import pytest
import torch

from kvcomp import (
    LazyEviction,
    RaaS,
    RecencyWindow,
)
from kvcomp.hf import Report
from slow.eviction import (
    DIM,
    HEADS,
    KV_HEADS,
    SCALE,
    UNITS,
    Trace,
    new_cache,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# What is counted, and the memory.


@pytest.mark.parametrize("unit", UNITS)
def test_the_figures_are_what_a_count_gives(unit):
    layers, lens, budget, window, steps = 2, (50, 14), 32, 8, 40
    method = LazyEviction(budget=budget, window=window, unit=unit)
    cache = new_cache(method, layers)
    Trace(*lens, steps=steps, layers=layers).run(cache)
    kept, longest, slots, read, events, gone = list(lens), [], [], 0, 0, 0
    for t in range(1, steps + 1):
        kept = [n + 1 for n in kept]
        longest.append(max(kept))
        read += sum(kept)
        notes = 3 if gone else 2  # the positions are known from the first eviction on
        slots.append(max(kept) * notes * 4 * UNITS[unit])
        if t % window == 0 and max(kept) > budget:
            events += 1
            gone += sum(max(n - budget, 0) for n in kept)
            kept = [min(n, budget) for n in kept]
    slot_bytes = 2 * DIM * 4 * (HEADS if unit == "query_head" else KV_HEADS)
    report = Report.of(method, cache.meter, 1.0, layers=True)
    assert report.kept_peak == max(longest) == max(budget, lens[0]) + window
    assert report.kept_mean == pytest.approx(sum(longest) / steps)
    assert report.evictions == events * layers
    assert report.tokens_evicted == gone * layers
    assert [layer["evicted_tokens"] for layer in report.layers] == [gone] * layers
    assert report.kv_bytes_freed == gone * layers * slot_bytes
    assert report.kv_bytes_kept == sum(kept) * layers * slot_bytes
    assert report.kv_bytes_peak == max(longest) * 2 * layers * slot_bytes
    assert report.kv_bytes_read == read * layers * slot_bytes
    rows = sum(tensor.nbytes for layer in cache.layers for tensor in layer.state.values())
    assert cache.layers[0].state["hits"].nbytes > 0
    assert report.tracking_bytes_peak == max(slots) * 2 * layers + rows
    assert report.kv_bytes_allocated == (budget + window) * 2 * layers * slot_bytes
    assert report.kv_bytes_dense == (sum(lens) + 2 * steps) * layers * 2 * DIM * 4 * KV_HEADS
    assert f"{gone * layers} tokens in {events * layers} evictions" in str(report)


def test_a_prompt_alone_is_counted_with_its_copies():
    method = LazyEviction(budget=32, window=8, unit="query_head")
    cache = new_cache(method, 2)
    Trace(20, 20, steps=1, layers=2).fill(cache)
    report = Report.of(method, cache.meter, 0.0, layers=False)
    assert report.kv_bytes_kept == report.kv_bytes_peak == 2 * 40 * 2 * DIM * 4 * HEADS
    assert report.kv_bytes_dense == 2 * 40 * 2 * DIM * 4 * KV_HEADS


def test_an_event_that_takes_nothing_is_none():
    """A pinned prompt is over the budget from the start, and nothing leaves before step 6."""
    cache = new_cache(RaaS(budget=16, window=5))
    Trace(50, 10, steps=5).run(cache)
    assert cache.meter.evictions == 1 and int(cache.meter.evicted_tokens[0]) == 4
    cache = new_cache(RaaS(budget=16))
    Trace(50, 10, steps=1).run(cache)
    assert cache.meter.evictions == 0


@pytest.mark.parametrize(
    "method, prompt",
    [
        (RecencyWindow(budget=24, window=8), 20),
        (RecencyWindow(budget=30, window=7), 100),
        (RecencyWindow(budget=300, window=50), 290),
        (RecencyWindow(budget=400, window=300), 299),
        (LazyEviction(budget=300, window=40, keep_prompt=True), 280),
        (LazyEviction(budget=300, window=40, keep_prompt=True), 310),
        (RaaS(budget=20), 60),
    ],
    ids=str,
)
def test_the_slab_is_no_larger_than_the_bound(method, prompt):
    keep = prompt + method.num_recent if method.keep_prompt else 0
    kept = max(method.budget, keep)
    bound = max(kept, prompt) + method.window
    cache, layer = (cache := new_cache(method)), cache.layers[0]
    k = torch.ones(1, KV_HEADS, 1, DIM)
    layer.append(k.expand(-1, -1, prompt, -1), k.expand(-1, -1, prompt, -1))
    cache.prefill(layer, torch.ones(1, HEADS, prompt, DIM), SCALE)
    evicted = False
    for _ in range(bound - prompt + 2 * method.window):
        layer.append(k, k)
        cache.attend(layer, torch.ones(1, HEADS, DIM), SCALE)
        evicted |= cache.meter.evictions > 0
        assert layer.capacity <= (kept + method.window if evicted else bound)
        assert layer.max_len <= bound
    assert evicted


# Parameters.


def test_published_parameters():
    found = LazyEviction.published("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "aime", budget=2048)
    assert (found.alpha, found.window, found.budget) == (1e-4, 363, 2048)
    assert LazyEviction.for_model("DeepSeek-R1-Distill-Llama-8B", window=9).alpha == 5e-4
    assert LazyEviction.for_model("another", budget=200) == LazyEviction(budget=200)
