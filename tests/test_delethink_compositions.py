"""Delethink around other methods, and what it asks of the cache, against slow readings."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV, reasoner
from kvcomp.cache import KVCache
from kvcomp.cache.slab import FIRST_CAPACITY
from kvcomp.methods.eviction import Eviction
from kvcomp.methods.retrieval import Retrieval
from kvcomp.testing.models import tiny_model
from slow import delethink as slow
from slow.eviction import DIM, INV_FREQ, KV_HEADS, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

NEVER = 1000  # an EOS that the model cannot say
QUESTION, TOKENS = 26, 30
SHORT = {"chunk": 15, "carry": 8, "head": 3, "max_chunks": None}
RETRIEVALS = [name for name, method in METHODS.items() if issubclass(method, Retrieval)]
EVICTIONS = [
    name
    for name, method in METHODS.items()
    if issubclass(method, Eviction) and not name.startswith("random")
]
CROPPABLE = [name for name, method in METHODS.items() if method.croppable]
IN_PIECES = ("h2o", "lagkv", "lazy-eviction", "snapkv")  # each takes a prompt in differently


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def texts():
    """Two questions without padding, and two outputs."""
    ids = torch.randint(3, 128, (2, QUESTION + TOKENS), generator=torch.Generator().manual_seed(1))
    return ids[:, :QUESTION], ids[:, QUESTION:]


def dictate(model, run, question, output, look=lambda cache, step: None, mask=None):
    """Logits [B, n, V] of a loop in which the model is told what to say."""
    cache = run.new_cache()
    with torch.no_grad():
        found = [model(question, mask, past_key_values=cache).logits[:, -1:]]
        for step, token in enumerate(output[:, :-1].split(1, 1), 1):
            found.append(model(token, past_key_values=cache).logits)
            look(cache, step)
    return torch.cat(found, 1)


def cold(model, inner, method, question, output, split):
    """The same, each chunk on a cold cache under the inner method alone."""
    with kvcomp.patch(model, inner) as run:
        forward = slow.stepwise(model, run.new_cache, split)
        return slow.logits(method, question, output, forward)


def as_a_whole(number, length):
    """A prompt at once, but for a carry's last token, which is a decode step."""
    return [length - 1, 1] if number else [length]


def behind_the_prefix(number, length):
    """Question and head as the first chunk had them: the head was decoded. The carry at once."""
    head = SHORT["head"]
    carried = length - QUESTION - head
    return [QUESTION, *[1] * head, carried - 1, 1] if number else [length]


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reset", ["prefill", "streaming"])
@pytest.mark.parametrize("inner", [Full(), Delta(budget=64, page_size=4, recent=2, warmup=1)])
def test_an_inner_method_that_leaves_nothing_out(llama, texts, inner, reset):
    method = Delethink(**SHORT, inner=inner, reset=reset, piece=3)
    with kvcomp.patch(llama, method) as run:
        got = dictate(llama, run, *texts)
    assert_close(got, slow.logits(method, *texts, slow.plain(llama)))


@pytest.mark.parametrize("reset", ["prefill", "streaming"])
@pytest.mark.parametrize("name", ["delta", "less-is-more", "tidal-decode"])
def test_sparse_attention_in_each_context(llama, texts, name, reset):
    inner = METHODS[name].example(16)
    method = Delethink(**SHORT, inner=inner, reset=reset, piece=3)
    with kvcomp.patch(llama, method) as run:
        got = dictate(llama, run, *texts)
    want = cold(llama, inner, method, *texts, behind_the_prefix)
    assert_close(got, want)
    assert (want - slow.logits(method, *texts, slow.plain(llama))).abs().max() > 0.1, "not sparse"
    assert run.report().tokens_attended < 0.9 * run.report().tokens_attended_dense


@pytest.mark.parametrize(
    ("name", "reset"),
    [*((name, "prefill") for name in EVICTIONS), *((name, "streaming") for name in IN_PIECES)],
)
def test_eviction_in_each_context(llama, texts, name, reset):
    """What was carried on is the prompt of a fresh cache."""
    inner = METHODS[name].example(24)
    method = Delethink(**SHORT, inner=inner, reset=reset, piece=3)
    longest = []

    def look(cache, step):
        longest.append(max(layer.max_len for layer in cache.context.kv.layers))

    with kvcomp.patch(llama, method) as run:
        got = dictate(llama, run, *texts, look)
    assert_close(got, cold(llama, inner, method, *texts, as_a_whole))
    report = run.report()
    assert report.evictions > 0
    assert max(longest) <= QUESTION + method.most_thought
    boundaries = report.boundaries
    assert report.tokens_decoded == 2 * (TOKENS - 1)
    assert report.tokens_reencoded == 2 * boundaries * (QUESTION + SHORT["carry"] - 1) > 0


@pytest.mark.parametrize(
    ("name", "reset"),
    [
        *((name, "rotate") for name in CROPPABLE),
        ("random-pages", "prefill"),
        ("random-pages", "streaming"),
        ("random-eviction", "prefill"),
        ("random-eviction", "streaming"),
    ],
)
def test_other_ways_run(llama, texts, name, reset):
    method = Delethink(**SHORT, inner=METHODS[name].example(16), reset=reset, piece=2)
    with kvcomp.patch(llama, method) as run:
        out = llama.generate(texts[0], max_new_tokens=TOKENS, eos_token_id=NEVER)
    assert out.shape == (2, QUESTION + TOKENS)
    assert run.report().boundaries == 3


@pytest.mark.parametrize("schedule", [(15, 8, 3), (9, 1, 0), (9, 2, 0)], ids=str)
@pytest.mark.parametrize("name", RETRIEVALS)
def test_retrieval_of_everything(llama, texts, name, schedule):
    """Left-padded, and with a carry of which nothing, or one token, is to be encoded."""
    question, output = texts
    chunk, carry, head = schedule
    method = Delethink(chunk, carry, None, head, inner=METHODS[name].example(256))
    mask = torch.ones_like(question)
    mask[0, :5] = 0
    with kvcomp.patch(llama, method) as run:
        got = dictate(llama, run, question * mask, output, mask=mask)
    rows = ((question[:1, 5:], output[:1]), (question[1:], output[1:]))
    want = [slow.logits(method, *row, slow.plain(llama)) for row in rows]
    assert_close(got, torch.cat(want))
    encoded = 2 * run.report().boundaries * (carry - 1)
    assert run.report().tokens_reencoded == encoded
    assert int(sum(run.meter.fetched_rows)) > 100


@pytest.mark.parametrize("name", ["louis-kv", "cluster-kv", "quest"])
@pytest.mark.parametrize("schedule", [(20, 8, 3), (20, 1, 0)], ids=str)
def test_a_long_question_stays_in_the_pool(llama, name, schedule):
    """At every step each token is in one place, and the pool is no longer than a context."""
    lens, width, tokens = (230, 205), 230, 66
    chunk, carry, head = schedule
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (2, width + tokens), generator=generator)
    mask = torch.ones(2, width, dtype=torch.long)
    mask[1, : width - lens[1]] = 0
    inner = METHODS[name].example(48)
    method = Delethink(chunk, carry, None, head, inner=inner)
    first, host = {}, []

    def look(cache, step):
        for layer in cache.context.kv.layers[inner.dense_layers :]:
            layer.settle()
            table = layer.positions(KV_HEADS)
            index, pool = layer.hosted.index, layer.hosted.pool
            opens, locals_ = index.first_open().tolist(), index.first_local().tolist()
            assert layer.max_len <= inner.most_resident
            for row, (n, end, local) in enumerate(zip(lens, opens, locals_, strict=True)):
                seen = int(layer.logical_lens[row])
                assert seen == n + held(step)
                k, v, _ = pool.read(row, 0, end)
                question = first.setdefault((layer.position, row), (k[:, :n], v[:, :n]))
                assert torch.equal(k[:, :n], question[0]) and torch.equal(v[:, :n], question[1])
                for kv_head in range(KV_HEADS):
                    assert len(k[kv_head].unique(dim=0)) == end
                    places = table[row, kv_head, : int(layer.seq_lens[row])]
                    wanted = {*range(inner.sinks), *range(local, seen)}
                    assert wanted <= set(places.tolist()) <= set(range(seen))
                    assert len(places.unique()) == len(places)
                    stored = places < end
                    slots = layer.keys[row, kv_head, : len(places)][stored]
                    assert torch.equal(slots, k[kv_head, places[stored].long()])
        host.append(run.meter.peak_host_bytes)

    def held(step):
        """Tokens of the output in the context after so many steps."""
        if step < chunk:
            return step
        return carry + (step - chunk) % (chunk - carry)

    with kvcomp.patch(llama, method) as run:
        dictate(llama, run, ids[:, :width] * mask, ids[:, width:], look, mask)
    assert run.report().boundaries >= 2
    assert host[0] == host[-1] > 0
    assert int(sum(run.meter.retrievals)) > 0


def test_the_step_behind_a_boundary_retrieves(llama, texts):
    """Also where nothing is encoded anew, and however alike the queries are."""
    inner = dataclasses.replace(METHODS["louis-kv"].example(24), tau=-1.0)
    done = [0]

    def look(cache, step):
        done.append(int(sum(run.meter.retrievals)))

    with kvcomp.patch(llama, Delethink(9, 1, None, 0, inner=inner)) as run:
        dictate(llama, run, *texts, look)
    layers = llama.config.num_hidden_layers - inner.dense_layers
    for step in (1, 9, 17, 25):
        assert done[step] - done[step - 1] == 2 * layers, f"step {step}: {done}"


def test_a_copy_over_a_pool_goes_on_by_itself(llama, texts):
    question, output = texts
    copies = []

    def look(cache, step):
        if step in (12, 14, 20):
            copies.append((step, copy.deepcopy(cache)))

    method = Delethink(**SHORT, inner=LouisKV.example(16))
    with kvcomp.patch(llama, method) as run, torch.no_grad():
        want = dictate(llama, run, question, output, look)
        for step, cache in copies:
            for later in range(step, TOKENS - 1):
                got = llama(output[:, later : later + 1], past_key_values=cache).logits
                assert_close(got, want[:, later + 1 : later + 2])


def test_the_reasoner_walks_on_across_boundaries():
    """The state of the walk is in the carry; without it, as with a carry of 1, it is lost."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    problem = reasoner.task.make_problem(nodes=8, steps=30, seed=1)
    question = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    gold = tokenizer(problem.gold(), return_tensors="pt")["input_ids"][:, -120:]
    right = {}
    for carry in (24, 1):
        method = Delethink(48, carry, max_chunks=None, head=0)
        with kvcomp.patch(model, method):
            out = model.generate(question, max_new_tokens=120, do_sample=False)
        out = out[:, question.shape[1] :]
        right[carry] = (out == gold[:, : out.shape[1]]).float().mean()
    assert right[24] > 0.95, right
    assert right[1] < 0.6


# --- what it asks of the cache ----------------------------------------------------------------

LENS, WIDTH, STEPS = (5, 9, 7), 9, 12


class Rows:
    """A layer of ragged rows, and the tokens that each should hold: `where` they should be."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (len(LENS), KV_HEADS, 400, DIM)
        self.raw = torch.randn(shape, generator=generator)  # by column, before rotation
        self.v = torch.randn(shape, generator=generator)
        self.columns, self.rows = [], [[] for _ in LENS]  # columns kept; columns of a row's tokens
        self.used = 0
        self.cache = KVCache(Full(), 1)
        self.layer = self.cache.layers[0]

    def append(self, count, padding=(0, 0, 0)):
        own = range(self.used, self.used + count)
        self.used += count
        keys, valid = self.raw[:, :, own].clone(), torch.ones(len(LENS), count, dtype=torch.bool)
        for row, (tokens, pad) in enumerate(zip(self.rows, padding, strict=True)):
            positions = len(tokens) - pad + torch.arange(count)
            keys[row] = rotate(keys[row], positions).float()
            valid[row, :pad] = False
            tokens += own[pad:]
        self.columns += own
        values = self.v[:, :, own]
        self.layer.append(keys, values, None if valid.all() else valid)

    def drop(self, first, last):
        gone = self.columns[first:last]
        self.columns = [x for x in self.columns if x not in gone]
        self.rows = [[x for x in tokens if x not in gone] for tokens in self.rows]

    def check(self, layer=None):
        layer = self.layer if layer is None else layer
        assert layer.columns == len(self.columns)
        assert layer.max_len == max(map(len, self.rows))
        for lens in (layer.seq_lens, layer.logical_lens):
            assert lens.tolist() == [len(tokens) for tokens in self.rows]
        seen = [[column in tokens for column in self.columns] for tokens in self.rows]
        assert layer.seen().tolist() == seen
        for row, tokens in enumerate(self.rows):
            keys = rotate(self.raw[row][:, tokens], range(len(tokens))).float()
            torch.testing.assert_close(
                layer.keys[row, :, : len(tokens)], keys, rtol=1e-4, atol=1e-5
            )
            assert torch.equal(layer.values[row, :, : len(tokens)], self.v[row][:, tokens])


def filled(padded=True):
    rows = Rows()
    rows.append(WIDTH, [WIDTH - n for n in LENS] if padded else (0, 0, 0))
    for _ in range(STEPS):
        rows.append(1)
    rows.check()
    return rows


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("first", "last"), [(9, 10), (9, 14), (12, 20), (15, 21), (11, 11)])
def test_fold_against_keys_turned_from_scratch(first, last, padded):
    rows = filled(padded)
    for again in range(2):
        rows.layer.fold(first, last, INV_FREQ)
        rows.drop(first, last)
        rows.check()
        for _ in range(last - first + again):
            rows.append(1)
        rows.check()
    rows.layer.crop(3)
    rows.drop(len(rows.columns) - 3, None)
    rows.check()


def test_fold_where_the_pieces_overlap():
    """The carry begins within the head: its first tokens are there twice, and need room."""
    rows = Rows()
    rows.append(FIRST_CAPACITY - 3)
    rows.layer.fold(FIRST_CAPACITY - 5, FIRST_CAPACITY - 10, INV_FREQ)
    rows.columns = [*range(FIRST_CAPACITY - 5), *range(FIRST_CAPACITY - 10, FIRST_CAPACITY - 3)]
    rows.rows = [list(rows.columns) for _ in LENS]
    rows.check()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("columns", [6, 9, 15, 21])
def test_adopt_copies_the_first_columns(columns, padded):
    rows = filled(padded)
    before = rows.layer.keys.clone()
    rows.layer.scale = 0.25
    copied = KVCache(Full(), 1)
    copied.adopt(rows.cache, columns, room=700)
    layer = copied.layers[0]
    assert layer.capacity == 700 and layer.scale == 0.25
    part = Rows()
    part.layer, part.used = layer, rows.used
    part.columns = rows.columns[:columns]
    part.rows = [[x for x in tokens if x in part.columns] for tokens in rows.rows]
    part.check()
    part.append(4)
    part.append(1)
    part.check()
    layer.crop(7)
    part.drop(columns - 2, None)
    part.check()
    assert torch.equal(rows.layer.keys, before), "the copy shares memory"
    rows.check()


def test_truncate_keeps_the_first_slots():
    rows = filled()
    layer, kept = rows.layer, rows.layer.keys[:, :, :3].clone()
    layer.positions(KV_HEADS)
    layer.truncate(WIDTH, 3)
    assert layer.columns == WIDTH and layer.max_len == 3
    assert layer.seq_lens.tolist() == [3, 3, 3]
    assert layer.logical_lens.tolist() == list(LENS)
    assert torch.equal(layer.keys, kept)
    assert not layer.slots["position"][..., 3:].any()
    layer.append(*(torch.randn(3, KV_HEADS, 2, DIM) for _ in range(2)))
    for row, n in enumerate(LENS):
        assert layer.positions(KV_HEADS)[row].tolist() == [[0, 1, 2, n, n + 1]] * KV_HEADS
    assert layer.seen().sum(1).tolist() == [n + 2 for n in LENS]


def test_only_a_whole_layer_folds_or_is_adopted():
    def noted(layer):
        layer.positions(KV_HEADS)

    def evicted(layer):
        layer.keep(torch.arange(4).expand(3, -1), torch.full((3,), 4, dtype=torch.int32))

    def repeated(layer):
        layer.repeat_heads(2 * KV_HEADS)

    for change in (noted, evicted, repeated):
        rows = filled()
        change(rows.layer)
        with pytest.raises(ValueError, match="fold: expected a layer that keeps every token"):
            rows.layer.fold(1, 2, INV_FREQ)
        with pytest.raises(ValueError, match="adopt: expected a layer that keeps every token"):
            KVCache(Full(), 1).adopt(rows.cache, 3, room=9)


def test_a_method_goes_back_as_far_as_it_can():
    """Dense attention to just there, an evicting method to nothing."""
    for method, stay in ((Full(), 11), (LazyEviction(budget=300, window=4), 0)):
        cache = KVCache(method, 2)
        rows = torch.randn(2, KV_HEADS, 14, DIM)
        for layer in cache.layers:
            layer.append(rows, rows)
            cache.prefill(layer, rows, 1.0)
        assert method.rewind(cache, 11) == stay
        assert [layer.columns for layer in cache.layers] == [stay, stay]
