"""The slab cache: ragged rows, growth, crop and row selection, against lists of tokens."""

import copy
import gc
import threading
import weakref

import pytest
import torch

from kvcomp.cache import KVCache
from kvcomp.cache.background import DEPTH, Background
from kvcomp.cache.host_pool import FIRST_ROWS, HostMemory, HostMemoryError, HostPool
from kvcomp.cache.hosted import Hosted
from kvcomp.cache.rows import Rows as Stored
from kvcomp.cache.slab import FIRST_CAPACITY
from kvcomp.cache.unit_index import FIRST_UNITS, UnitIndex
from kvcomp.methods import Full

BATCH, HEADS, DIM = 3, 2, 32


class Rows:
    """What a row should hold, kept the slow way: one list of token tensors per row."""

    def __init__(self) -> None:
        self.cache = KVCache(Full(), 1)
        self.layer = self.cache.layers[0]
        self.rows = [[] for _ in range(BATCH)]
        self.columns = []  # per column, which rows it was valid for

    def append(self, count, valid=None):
        k = torch.randn(len(self.rows), HEADS, count, DIM)
        self.layer.append(k, k + 1, valid)
        for column in range(count):
            took = [valid is None or bool(valid[row, column]) for row in range(len(self.rows))]
            for row, tokens in enumerate(self.rows):
                if took[row]:
                    tokens.append(k[row, :, column])
            self.columns.append(took)

    def crop(self, count):
        self.cache.crop(count)
        for _ in range(count):
            for tokens, took in zip(self.rows, self.columns.pop(), strict=True):
                if took:
                    tokens.pop()

    def select(self, rows):
        self.cache.select(torch.tensor(rows))
        self.rows = [list(self.rows[row]) for row in rows]
        self.columns = [[took[row] for row in rows] for took in self.columns]

    def check(self):
        layer = self.layer
        assert layer.columns == len(self.columns)
        assert layer.seq_lens.tolist() == [len(tokens) for tokens in self.rows]
        assert layer.max_len >= max(len(tokens) for tokens in self.rows)
        for row, tokens in enumerate(self.rows):
            if tokens:
                want = torch.stack(tokens, 1)
                assert torch.equal(layer.keys[row, :, : len(tokens)], want)
                assert torch.equal(layer.values[row, :, : len(tokens)], want + 1)


def left_padding(*lengths):
    width = max(lengths)
    return torch.tensor([[column >= width - n for column in range(width)] for n in lengths])


def test_append_grows_in_place():
    rows = Rows()
    rows.append(FIRST_CAPACITY - 1)
    before = rows.layer.keys.data_ptr()
    rows.append(1)
    assert rows.layer.keys.data_ptr() == before
    rows.append(1)
    assert rows.layer.capacity > FIRST_CAPACITY + 1
    rows.check()


def test_padding_is_dropped_per_row():
    rows = Rows()
    rows.append(9, left_padding(9, 2, 5))
    rows.append(1)
    rows.append(4, torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool())
    rows.append(2)
    rows.check()


def test_crop_is_exact():
    rows = Rows()
    rows.append(7, left_padding(7, 3, 1))
    for _ in range(5):
        rows.append(1)
    rows.crop(3)
    rows.check()
    rows.append(2)
    rows.crop(6)  # into the padded prompt
    rows.check()
    rows.append(3)
    rows.check()
    with pytest.raises(ValueError, match="has seen"):
        rows.crop(100)


def test_crop_is_refused_where_tokens_are_gone():
    class Forgetful(Full):
        croppable = False

    cache = KVCache(Forgetful(), 1)
    k = torch.randn(BATCH, HEADS, 4, DIM)
    cache.layers[0].append(k, k)
    with pytest.raises(ValueError, match="Forgetful cannot take tokens back"):
        cache.crop(1)
    assert cache.layers[0].columns == 4


def test_tokens_leave_in_place_with_what_is_known_about_them():
    rows = Rows()
    layer = rows.layer
    rows.append(8, left_padding(8, 3, 5))
    rows.append(2)
    layer.track("mark", 1)[..., :10] = 100 + layer.positions(1)
    victims = torch.tensor([[[0, 2, 5, 9]], [[-1] * 4], [[1, -1, -1, -1]]], dtype=torch.int32)
    layer.evict(victims, torch.tensor([6, 6, 6], dtype=torch.int32), 0, 6)
    assert layer.seq_lens.tolist() == [6, 5, 6] and layer.logical_lens.tolist() == [10, 5, 7]
    rows.append(1)
    rows.append(FIRST_CAPACITY)  # the slab grows, and takes all of it along
    positions = layer.positions(1)[:, 0]
    kept = [[1, 3, 4, 6, 7, 8, 10], [0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5, 6, 7]]
    for row, tokens in enumerate(rows.rows):
        kept[row] += range(kept[row][-1] + 1, len(tokens))
        place = positions[row, : len(kept[row])]
        assert sorted(place.tolist()) == kept[row]
        want = torch.stack([tokens[i] for i in place.tolist()], 1)
        assert torch.equal(layer.keys[row, :, : len(place)], want)
        assert torch.equal(layer.values[row, :, : len(place)], want + 1)
        old = place[:6] if row != 1 else place[:5]
        assert torch.equal(layer.slots["mark"][row, 0, : len(old)], 100 + old)
        assert not layer.slots["mark"][row, 0, len(old) :].any()
    with pytest.raises(ValueError, match="tokens have been evicted"):
        rows.cache.crop(1)


def test_rows_move_together():
    rows = Rows()
    rows.append(6, left_padding(6, 2, 4))
    rows.select([2, 2, 0, 1])
    rows.append(2)
    rows.check()
    rows.select([3, 0])
    rows.crop(1)
    rows.check()


def test_heads_of_a_token_side_by_side(monkeypatch):
    """In another order in memory, and otherwise the same: growth, crop, reordering, copies."""
    monkeypatch.setattr("kvcomp.cache.slab.TOKEN_ROW", 4 * HEADS * DIM)
    rows = Rows()
    rows.layer.shared_sets = True
    rows.append(9, left_padding(9, 2, 5))
    for count in (1, FIRST_CAPACITY, 1):
        rows.append(count)
        stride = rows.layer.keys.stride()
        assert stride[1] == DIM and stride[2] == HEADS * DIM
        rows.check()
    rows.crop(3)
    rows.select([2, 0, 0])
    rows.append(2)
    rows.check()
    monkeypatch.setattr("kvcomp.cache.slab.TOKEN_ROW", 4 * HEADS * DIM + 1)
    short = Rows()
    short.layer.shared_sets = True
    short.append(4)
    assert short.layer.keys.stride(2) == DIM


def test_a_dropped_cache_is_gone_at_once():
    rows = Rows()
    rows.append(5)
    other = copy.deepcopy(rows.cache)
    assert all(layer.cache is other for layer in other.layers)
    slab = weakref.ref(rows.layer._k)
    gc.disable()  # so that nothing but the counting of references can free it
    try:
        del rows
        assert slab() is None
    finally:
        gc.enable()
    assert other.layers[0].keys.shape[2] == 5


def test_reset_gives_memory_back():
    rows = Rows()
    rows.append(10)
    assert rows.layer.capacity > 0
    rows.cache.reset()
    assert rows.layer.capacity == 0


def test_what_only_comes_with_tokens_says_so_before():
    layer = KVCache(Full(), 1).layers[0]
    early = {name: "the first append" for name in ("seq_lens", "logical_lens", "keys", "values")}
    early |= {name: "a method that retrieves has got the prompt" for name in ("hosted",)}

    def all_refuse(names):
        for name in names:
            with pytest.raises(AttributeError, match=f"there is none before {early[name]}"):
                getattr(layer, name)

    all_refuse(early)
    assert not (layer.filled or layer.allocated or layer.is_hosted) and layer.capacity == 0
    layer.append(torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3, 32))
    assert layer.filled and layer.allocated and layer.seq_lens.tolist() == [3]
    all_refuse(("hosted",))
    layer.reset()
    all_refuse(early)


def test_mismatch_is_refused_and_nothing_is_lost():
    rows = Rows()
    rows.append(4)
    k = torch.randn(BATCH, HEADS, 1, DIM)
    for bad_k, bad_v, what in (
        (k[:2], k[:2], "batch size"),
        (k[..., :16], k[..., :16], "head size"),
        (k.half(), k.half(), "dtype"),
        (k, k[..., :16], "head size of V"),
        (k[:, :, :0], k[:, :, :0], "none of them 0"),
    ):
        with pytest.raises(ValueError, match=what):
            rows.layer.append(bad_k, bad_v)
    with pytest.raises(ValueError, match="valid"):
        rows.layer.append(k, k, torch.ones(BATCH, 2, dtype=torch.bool))
    rows.check()


# What retrieval adds: tokens that go to a pool and come back.


def test_only_the_listed_tokens_stay():
    rows = Rows()
    layer = rows.layer
    rows.append(700, left_padding(700, 3, 5))
    rows.append(2)
    layer.positions(HEADS)
    slots = torch.tensor([[0, 1, 600, 701, 0], [0, 4, 2, 3, 1], [6, 5, 0, 0, 0]])
    layer.keep(slots, torch.tensor([4, 5, 2], dtype=torch.int32))
    assert layer.seq_lens.tolist() == [4, 5, 2] and layer.max_len == 5
    assert layer.logical_lens.tolist() == [702, 5, 7] and layer.columns == 702
    assert layer.capacity == FIRST_CAPACITY
    rows.append(1)
    positions = layer.positions(HEADS)
    for row, (lasting, count) in enumerate(zip(slots.tolist(), (4, 5, 2), strict=True)):
        kept = [*lasting[:count], len(rows.rows[row]) - 1]
        assert positions[row, :, : count + 1].tolist() == [kept] * HEADS
        want = torch.stack([rows.rows[row][i] for i in kept], 1)
        assert torch.equal(layer.keys[row, :, : count + 1], want)
        assert torch.equal(layer.values[row, :, : count + 1], want + 1)
    with pytest.raises(ValueError, match="tokens have been evicted"):
        rows.cache.crop(1)


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
