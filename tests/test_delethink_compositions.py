"""Delethink around other methods, against slow readings."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LouisKV, reasoner
from kvcomp.methods.eviction import Eviction
from kvcomp.methods.retrieval import Retrieval
from kvcomp.testing.models import tiny_model
from slow import delethink as slow
from slow.eviction import KV_HEADS

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
