"""Drafts behind the tokens of a cache: what is accepted was decoded, the rest has never been."""

import dataclasses
from copy import deepcopy

import pytest
import torch

import kvcomp
from kvcomp import METHODS, Delta, Full, LazyEviction
from kvcomp.cache.arrivals import Arrivals
from kvcomp.methods.eviction import Eviction
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PADDED = 5
IDS = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :PADDED] = 0
STEPS = 30
NAMES = [name for name in METHODS if name not in ("delethink", "lm-infinite")]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def small(name):
    """An instance that leaves out or evicts something within these tests, with room for drafts."""
    cls = METHODS[name]
    method = cls() if name == "full" else cls.example(32)
    if issubclass(cls, Eviction):
        method = dataclasses.replace(method, budget=26, window=6)
    return method


def prefill(model, run):
    cache = run.new_cache()
    places = (MASK.cumsum(1) - 1).clamp(min=0)
    out = model(IDS, attention_mask=MASK, position_ids=places, past_key_values=cache)
    return cache, out.logits[:, -1].argmax(-1)


def check(model, cache, drafts):
    """The greedy tokens behind each of drafts [B, m], which are staged."""
    first = cache.kv.layers[0].logical_lens[:, None]
    cache.stage()
    places = first + torch.arange(drafts.shape[1])
    return model(drafts, position_ids=places, past_key_values=cache).logits.argmax(-1)


def one_by_one(model, run):
    cache, token = prefill(model, run)
    tokens = [token]
    for _ in range(STEPS):
        places = cache.kv.layers[0].logical_lens[:, None]
        out = model(tokens[-1][:, None], position_ids=places, past_key_values=cache)
        tokens.append(out.logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1), cache


def speculated(model, run, truth, right, own=False):
    """Drafts that are `right` so often; `own`: each row accepts what it can."""
    cache, token = prefill(model, run)
    rows, generator = [[int(t)] for t in token], torch.Generator().manual_seed(1)
    while min(map(len, rows)) <= STEPS:
        wish = int(torch.randint(1, 8, (), generator=generator))
        most = int(min(wish, cache.room, STEPS + 1 - min(map(len, rows))))
        drafts = torch.zeros(len(rows), most, dtype=torch.long)
        for row, known in enumerate(rows):
            ahead = truth[row, len(known) : len(known) + most - 1].tolist()
            drafts[row, 0] = known[-1]
            for place, token in enumerate(ahead):
                wrong = float(torch.rand((), generator=generator)) >= right
                drafts[row, 1 + place] = (token + wrong) % 128
        got = check(model, cache, drafts)
        same = (drafts[:, 1:] == got[:, :-1]).int().cumprod(1)
        counts = 1 + same.sum(1)
        counts = counts if own else counts.min()
        cache.commit(counts if own else int(counts))
        for row, count in enumerate(counts.expand(len(rows)).tolist()):
            rows[row] += got[row, :count].tolist()
    return torch.tensor([row[: STEPS + 1] for row in rows]), cache


def remembered(layer, own_steps=True):
    """What a layer knows, by name, without what lies behind its tokens."""
    known = {"seen": layer.logical_lens, "kept": layer.seq_lens, **layer.state}
    known.pop("hits", None)  # bits of a ring; those replayed are in the slots
    places = layer.positions(layer.keys.shape[1] if not layer.slots else 1)
    tables = {"place": places, "keys": layer.keys[..., 0], "values": layer.values[..., 0]}
    for name, table in (tables | layer.slots).items():
        for row, count in enumerate(layer.seq_lens.tolist()):
            known[f"{name} {row}"] = table[row, :, :count]
    if layer.is_hosted:
        index = layer.hosted.index
        known |= {"units": index.num_units, "indexed": index.num_indexed}
    return known


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.allclose(got[name].double(), tensor.double(), rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("right", [1.0, 0.6])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_accepted_drafts_were_decode_steps(llama, name, right):
    """Tokens and all that the method remembers, where the last commit ends with the last step."""
    method = small(name)
    with kvcomp.patch(llama, method) as run:
        truth, cache = one_by_one(llama, run)
        plain, meter = run.report(), run.meter
    with kvcomp.patch(llama, method) as run:
        got, again = speculated(llama, run, truth, right)
        report = run.report()
    for counted in ("dense_tokens", "sum_len", "steps", "peak_len"):
        assert int(getattr(run.meter, counted)) == int(getattr(meter, counted)), counted
    assert torch.equal(got, truth)
    assert again.kv.steps == cache.kv.steps == STEPS
    for one, other in zip(cache.kv.layers, again.kv.layers, strict=True):
        assert_same(remembered(other), remembered(one))
    assert report.tokens_decoded == plain.tokens_decoded
    assert report.evictions == plain.evictions
    assert report.retrievals == plain.retrievals
    assert report.tokens_drafted > report.tokens_accepted or right == 1
    assert report.tokens_accepted
    if right == 1:
        assert report.verifications < STEPS


@pytest.mark.parametrize("kv", ["model", "int8"])
@pytest.mark.parametrize("name", ["full", "delta", "lazy-eviction", "louis-kv"])
@torch.no_grad()
def test_a_checked_token_has_the_bits_of_its_step(llama, name, kv):
    """Logits of six tokens of two rows, in one forward and in six."""
    tokens = IDS[:, :6]
    with kvcomp.patch(llama, small(name), kv=kv) as run:
        cache, _ = prefill(llama, run)
        want = []
        for index in range(tokens.shape[1]):
            places = cache.kv.layers[0].logical_lens[:, None]
            given = {"position_ids": places, "past_key_values": cache}
            want.append(llama(tokens[:, index : index + 1], **given).logits[:, 0])
        cache, _ = prefill(llama, run)
        cache.stage()
        places = cache.kv.layers[0].logical_lens[:, None] + torch.arange(tokens.shape[1])
        got = llama(tokens, position_ids=places, past_key_values=cache).logits
        cache.discard()
    assert torch.equal(got, torch.stack(want, 1))


@pytest.mark.parametrize("name", ["full", "delta", "tidal-decode"])
@torch.no_grad()
def test_rows_accept_numbers_of_their_own(llama, name):
    with kvcomp.patch(llama, small(name)) as run:
        truth, _ = one_by_one(llama, run)
        got, cache = speculated(llama, run, truth, 0.6, own=True)
    assert torch.equal(got, truth)
    assert cache.columns > IDS.shape[1] + STEPS, "the rows went together"


def state(thing, seen):
    """Everything that a cache is made of, tensors cloned."""
    if isinstance(thing, torch.Tensor):
        return thing.clone()
    if isinstance(thing, dict):
        return {name: state(value, seen) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [state(value, seen) for value in thing]
    if type(thing).__module__.startswith("kvcomp.cache") and id(thing) not in seen:
        seen.add(id(thing))
        return {name: state(value, seen) for name, value in vars(thing).items()}
    return thing


def same(got, want, path=""):
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), path
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for name in want:
            same(got[name], want[name], f"{path}.{name}")
    elif isinstance(want, list):
        assert len(got) == len(want), path
        for place, each in enumerate(zip(got, want, strict=True)):
            same(*each, f"{path}[{place}]")
    elif isinstance(want, (int, float, str, bool, Arrivals)):
        assert got == want, path


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_discarded_drafts_have_never_been(llama, name):
    """All tensors are as they were; behind the tokens, in slots and pool, anything may lie."""
    with kvcomp.patch(llama, small(name)) as run:
        cache, token = prefill(llama, run)
        for _ in range(7):
            places = cache.kv.layers[0].logical_lens[:, None]
            out = llama(token[:, None], position_ids=places, past_key_values=cache)
            token = out.logits[:, -1].argmax(-1)
        for layer in cache.kv.layers:
            layer.positions(layer.keys.shape[1] if not layer.slots else 1)
        untouched = deepcopy(cache)
        drafts = torch.cat([token[:, None], IDS[:, :3]], 1)
        first = check(llama, cache, drafts)
        cache.discard()
        for got, want in zip(cache.kv.layers, untouched.kv.layers, strict=True):
            beside = {"_k", "_v", "_cache", "_accepted", "hosted", "slots"}
            same(
                *(
                    {n: v for n, v in state(x, set()).items() if n not in beside}
                    for x in (got, want)
                )
            )
            assert_same(remembered(got), remembered(want))
        assert torch.equal(check(llama, cache, drafts), first)
        cache.commit(1)
        assert cache.columns == untouched.columns + 1


@torch.no_grad()
def test_one_selection_for_all_drafts_is_the_first_ones(llama):
    """`Delta(select="step")`: nothing accepted, and it is Delta's own step."""
    method = dataclasses.replace(Delta.example(32), select="step")
    with kvcomp.patch(llama, method) as run:
        truth, _ = one_by_one(llama, run)
        got, _ = speculated(llama, run, truth, 0.0)
        assert torch.equal(got, truth)
        read = run.report().kv_bytes_read
    with kvcomp.patch(llama, Delta.example(32)) as run:
        one_by_one(llama, run)
        speculated(llama, run, truth, 0.0)
        assert read < run.report().kv_bytes_read, "the pages are read once for all"


@torch.no_grad()
def test_what_cannot_be_staged_is_refused(llama):
    h2o, lm_infinite = METHODS["h2o"].example(32), METHODS["lm-infinite"].example(32)
    for method, match in ((h2o, "evicts at every step"), (lm_infinite, "evicts at every step")):
        with kvcomp.patch(llama, dataclasses.replace(method, window=1)) as run:
            cache, _ = prefill(llama, run)
            with pytest.raises(ValueError, match=match):
                cache.stage()
    with kvcomp.patch(llama, dataclasses.replace(lm_infinite, window=4)) as run:
        cache, _ = prefill(llama, run)
        with pytest.raises(ValueError, match="how several tokens attend at once"):
            cache.stage()
    with kvcomp.patch(llama, LazyEviction(budget=26, window=6)) as run:
        with pytest.raises(ValueError, match="has seen the prompt"):
            run.new_cache().stage()
        cache, token = prefill(llama, run)
        drafts = token[:, None].expand(-1, 8)
        assert cache.room == 6
        check(llama, cache, drafts)
        for counts, match in (
            (9, "expected 0 to 8"),
            (-1, "expected 0 to 8"),
            (7, "room for them .6."),
            (torch.tensor([1, 2]), "one number for all"),
        ):
            with pytest.raises(ValueError, match=match):
                cache.commit(counts)
        with pytest.raises(ValueError, match="wait for commit"):
            llama(token[:, None], past_key_values=cache)
        with pytest.raises(ValueError, match="wait for commit"):
            cache.batch_select_indices(torch.tensor([1, 0]))
        cache.commit(2)
        assert cache.get_seq_length() == IDS.shape[1] + 2
    with kvcomp.patch(llama, Full()) as run:
        cache, token = prefill(llama, run)
        with pytest.raises(ValueError, match="nothing is staged"):
            cache.commit(1)
