"""Host memory of retrieval methods: where it ends, cannot be pinned, or fails in the background."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kvcomp import LouisKV
from kvcomp.cache import host_pool
from kvcomp.cache.host_pool import HostMemory, HostMemoryError, HostPool
from kvcomp.cache.rows import Rows
from retrieval_examples import louis
from slow.eviction import DIM, KV_HEADS, SCALE, new_cache
from slow.retrieval_traces import Walk

pytestmark = pytest.mark.usefixtures("one_thread")


# Memory that is refused.


BLOCK = 2 * KV_HEADS * 256 * 2 * DIM * 4  # the first block of two rows


def test_a_pool_holds_the_same_whichever_way_it_is_written():
    """From a GPU rows are laid out first; here by a pool that takes the CPU for one."""
    k, v = torch.randn(2, 2, 700, 32).unbind()
    for device in "cpu", "cuda":
        pool = HostPool(Rows(k[None], v[None]), HostMemory())
        pool.reserve(300)
        pool.reserve(703)
        assert len(pool.blocks) == 2
        pool.device = torch.device(device)
        pool.write(0, 3, Rows(k, v))
        pool.device = torch.device("cpu")
        for found, want in zip(pool.read(0, 3, 703).parts, (k, v), strict=True):
            assert torch.equal(found, want)


def test_pinned_memory_counts_as_torch_takes_it(monkeypatch):
    """A power of two of bytes for each block."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **rest: plain(*shape, **rest))
    memory = HostMemory(limit=4096)
    assert memory.empty((3, 100), torch.float32, pinned=True).nbytes == 1200
    assert memory.used == 2048
    with pytest.raises(HostMemoryError, match="2048 are taken; 4096 more are needed"):
        memory.empty((3, 200), torch.float32, pinned=True)
    memory.empty((512,), torch.float32, pinned=True)
    assert memory.used == 4096


def test_pinned_rows_that_are_selected_take_what_they_took(monkeypatch):
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **rest: plain(*shape, **rest))
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    pool = HostPool(Rows(*torch.zeros(2, 3, 2, 1, 32)), HostMemory())
    pool.device = torch.device("cuda")
    pool.reserve(300)
    before = pool.memory.used
    for _ in range(3):
        pool.select(torch.arange(3))
    assert pool.memory.used == before == 2**19 > pool.nbytes


def test_host_memory_over_its_limit():
    trace = Walk(40, 12, steps=240)
    cache = new_cache(louis(host_limit=BLOCK - 1))
    want = f"limit of {BLOCK - 1} bytes, of which 0 are taken; {BLOCK} more are needed"
    with pytest.raises(HostMemoryError, match=want):
        trace.fill(cache)
    cache, free = new_cache(louis(host_limit=2 * BLOCK - 1)), new_cache(louis())
    for each in (cache, free):
        trace.fill(each)
    for step in range(256 - 40):
        assert torch.equal(trace.decode(cache, step), trace.decode(free, step))
    layer, step = cache.layers[0], 256 - 40
    with pytest.raises(HostMemoryError, match=f"limit of .* {BLOCK} are taken; {BLOCK} more"):
        trace.decode(cache, step)
    assert cache.state.memory.used == BLOCK == layer.hosted.pool.nbytes
    cache.state.memory.limit = None  # given more, it goes on as if nothing had been
    q = trace.q[0][torch.arange(2), :, torch.tensor(trace.lens) + step]
    assert torch.equal(cache.attend(layer, q, SCALE), trace.decode(free, step)[0])
    for later in range(step + 1, 240):
        assert torch.equal(trace.decode(cache, later), trace.decode(free, later))


def test_rows_that_have_no_room_are_not_lost():
    trace = Walk(40, 12, steps=20)
    cache = new_cache(louis(host_limit=BLOCK))
    trace.fill(cache)
    with pytest.raises(HostMemoryError, match=f"limit of {BLOCK} bytes"):
        cache.select(torch.tensor([0, 0, 1]))
    assert cache.state.memory.used == BLOCK == cache.layers[0].hosted.pool.nbytes
    got = torch.stack([trace.decode(cache, step) for step in range(20)])
    assert torch.equal(got, trace.run(new_cache(louis())))


def test_memory_that_cannot_be_pinned(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    trace, cache = Walk(40, 12, steps=9), new_cache(louis())
    empty = torch.empty
    monkeypatch.setattr(host_pool.torch, "empty", refuse)
    with pytest.raises(HostMemoryError, match=f"{BLOCK} bytes were refused, 0 are .*out of memory"):
        trace.fill(cache)
    assert issubclass(HostMemoryError, MemoryError)
    assert cache.state.memory.used == 0
    monkeypatch.setattr(host_pool.torch, "empty", empty)
    cache.reset()
    assert torch.equal(trace.run(cache), trace.run(new_cache(louis())))


# What goes wrong in the background.


def test_what_fails_in_the_background_is_raised_and_stays_raised():
    class Failing(LouisKV):
        def units(self, keys, first, last):
            raise ArithmeticError("in the background")

    fields = dataclasses.asdict(louis())
    trace, cache = Walk(40, 12, steps=3), new_cache(Failing(**fields))
    trace.fill(cache)
    with pytest.raises(ArithmeticError, match="in the background"):
        copy.deepcopy(cache)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="in the background"):
            trace.decode(cache, 0)
