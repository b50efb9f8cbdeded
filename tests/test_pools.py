"""Tokens in host memory: pools, exchanges with the device, indexes, work in the background."""

import copy
import threading

import pytest
import torch

from cache_rows import BATCH, DIM, HEADS, Rows
from kvcomp.cache.background import DEPTH, Background
from kvcomp.cache.host_pool import FIRST_ROWS, HostMemory, HostMemoryError, HostPool
from kvcomp.cache.hosted import Hosted
from kvcomp.cache.rows import Rows as Stored
from kvcomp.cache.unit_index import FIRST_UNITS, UnitIndex


def new_hosted(layer):
    return Hosted(layer, HostMemory(), Background(torch.device("cpu")), DIM, 1)


def test_tokens_are_exchanged_for_those_that_are_wanted():
    rows = Rows()
    layer = rows.layer
    rows.append(9)
    layer.positions(HEADS)
    hosted = layer.hosted = new_hosted(layer)
    hosted.pool.reserve(20)
    for row in range(BATCH):
        hosted.pool.write(row, 0, layer.stored().row(row))
    layer.keep(torch.tensor([[0, 6, 7, 8]] * BATCH), torch.full((BATCH,), 4, dtype=torch.int32))
    layer.limit(6, 1)
    rows.append(1)
    wanted = torch.tensor([[2, 3, 5, -1], [1, 2, 4, -1]], dtype=torch.int32).repeat(BATCH, 1, 1)
    first_local, active = (torch.tensor(x, dtype=torch.int32) for x in ([8] * 3, [1, 0, 1]))
    fetched = hosted.exchange(layer, wanted, first_local, active, 6)
    assert fetched.tolist() == [[3, 3], [0, 0], [3, 3]]
    assert layer.seq_lens.tolist() == [6, 5, 6] and layer.max_len == 6
    rows.append(1)  # no longer of one length
    for row in range(BATCH):
        length = int(layer.seq_lens[row])
        for head in range(HEADS):
            held = layer.positions(HEADS)[row, head, :length].tolist()
            new = wanted[row, head, :3].tolist() if row != 1 else [6, 7]
            assert sorted(held) == sorted([0, *new, 8, 9, 10])
            want = torch.stack([rows.rows[row][i][head] for i in held])
            assert torch.equal(layer.keys[row, head, :length], want)
            assert torch.equal(layer.values[row, head, :length], want + 1)


def test_a_layer_settles_once_and_never_forgets_a_failure():
    rows, calls = Rows(), []
    layer = rows.layer
    layer.settle()  # has nothing in host memory
    rows.append(1)
    hosted = layer.hosted = new_hosted(layer)
    layer.settle()
    hosted.pending = lambda: calls.append(1)
    layer.settle()
    layer.settle()
    assert calls == [1] and hosted.pending is None
    hosted.pending = Background(torch.device("cpu")).submit(lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            layer.settle()
    layer.reset()
    layer.settle()


def test_pool_of_several_blocks():
    like, memory = torch.zeros(2, HEADS, 0, DIM, dtype=torch.bfloat16), HostMemory()
    pool, rows = HostPool(Stored(like, like), memory), 3 * FIRST_ROWS + 5
    pool.reserve(FIRST_ROWS - 9)
    first = pool.blocks[0].data_ptr()
    for more in (FIRST_ROWS, FIRST_ROWS + 1, 2 * FIRST_ROWS, rows):
        pool.reserve(more)
        assert pool.capacity >= more
    assert pool.blocks[0].data_ptr() == first and len(pool.blocks) == 3
    assert memory.used == pool.nbytes == pool.capacity * 2 * HEADS * 2 * DIM * 2
    k, v = torch.randn(2, 2, HEADS, rows, DIM).bfloat16()
    for row in range(2):
        pool.write(row, 0, Stored(k[row], v[row]))
    k[1, :, 200:600] = v[1, :, 200:600] = 7
    pool.write(1, 200, Stored(k[1, :, 200:600], v[1, :, 200:600]))
    for row, begin, end in ((0, 0, rows), (1, 0, rows), (1, 250, 520), (0, 4, 4), (1, 256, 512)):
        got = pool.read(row, begin, end)
        assert torch.equal(got[0], k[row, :, begin:end]) and torch.equal(
            got[1], v[row, :, begin:end]
        )
    copied = copy.deepcopy(pool)
    pool.select(torch.tensor([1, 1, 0]))
    assert memory.used == pool.nbytes == 3 * pool.capacity * HEADS * 2 * DIM * 2
    assert [bool((pool.read(b, 0, rows)[0] == k[r]).all()) for b, r in enumerate((1, 1, 0))] == [
        True
    ] * 3
    assert copied.memory is not memory and copied.memory.used == copied.nbytes
    copied.write(0, 0, Stored(v[0], k[0]))
    assert torch.equal(copied.read(0, 0, rows)[0], v[0])
    assert torch.equal(pool.read(2, 0, rows)[0], k[0])


def test_a_refused_pool_stays_as_it_is():
    like = torch.zeros(1, HEADS, 0, DIM)
    row_bytes = HEADS * 2 * DIM * 4
    memory = HostMemory(limit=2 * FIRST_ROWS * row_bytes)
    pool, other = (HostPool(Stored(like, like), memory) for _ in range(2))
    for each in (pool, other):
        each.reserve(1)
    pool.write(0, 0, Stored(torch.ones(HEADS, 1, DIM), torch.zeros(HEADS, 1, DIM)))
    for refused in (
        lambda: pool.reserve(FIRST_ROWS + 1),
        lambda: pool.select(torch.tensor([0, 0])),
    ):
        with pytest.raises(HostMemoryError, match=f"limit of {memory.limit} bytes, of which"):
            refused()
        assert pool.capacity == FIRST_ROWS and len(pool.blocks) == 1
        assert memory.used == memory.limit == pool.nbytes + other.nbytes
        assert (pool.read(0, 0, 1)[0] == 1).all()


def test_index_grows_and_moves():
    index = UnitIndex(2, HEADS, 4, torch.zeros(1))
    index.starts.fill_(3)
    assert index.first_open().tolist() == index.first_local().tolist() == [3, 3]
    ends = torch.tensor([3, 3])
    for unit in range(FIRST_UNITS + 9):
        index.reserve(1)
        ends = ends + torch.tensor([1, unit % 2])
        index.close(ends)
        index.digests[:, :, unit] = unit
    assert index.num_units.tolist() == [FIRST_UNITS + 9] * 2
    assert index.first_open().tolist() == ends.tolist() and index.first_local().tolist() == [3, 3]
    index.num_indexed[0] = 2
    assert index.first_local().tolist() == [5, 3]
    assert (index.digests[0, 0, : FIRST_UNITS + 9, 0] == torch.arange(FIRST_UNITS + 9.0)).all()
    index.reserve(3)
    sizes = torch.tensor([[2, 0, 1], [1, 0, 2]])
    digests = torch.full((HEADS, 3, 4), torch.nan)
    index.write(1, FIRST_UNITS + 9, digests, sizes)
    begin = int(ends[1])
    assert index.starts[1, :, FIRST_UNITS + 9 : FIRST_UNITS + 13].tolist() == [
        [begin, begin + 2, begin + 2, begin + 3],
        [begin, begin + 1, begin + 1, begin + 3],
    ]
    assert (index.digests[1, :, FIRST_UNITS + 10] == 0).all()  # an empty unit
    index.select(torch.tensor([1, 0, 0]))
    assert index.num_indexed.tolist() == [0, 2, 2] and index.starts.shape[0] == 3
    index.num_indexed[1] = 1
    assert index.first_local().tolist() == [3, 4, 5]


def test_background_keeps_order_and_bounds_what_is_under_way():
    line, gate, done = Background(torch.device("cpu")), threading.Event(), []
    waits = [line.submit(lambda: (gate.wait(60), done.append(0)))]
    waits += [line.submit(lambda i=i: done.append(i)) for i in range(1, DEPTH)]
    assert not done
    threading.Timer(0.05, gate.set).start()
    waits.append(line.submit(lambda: done.append(DEPTH)))  # waits for the first
    assert done[0] == 0
    waits[-1]()
    assert done == list(range(DEPTH + 1))
    with pytest.raises(ZeroDivisionError):
        line.submit(lambda: 1 / 0)()
    modes = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            line.submit(
                lambda: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            )()
    assert modes == [(True, False), (False, False)]
    assert copy.deepcopy(line) is line
