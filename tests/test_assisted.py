"""Assisted decoding of `generate`: the very tokens of decoding without an assistant."""

import pytest
import torch

import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PHRASE = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(5))
IDS = PHRASE.repeat(1, 3)
LAZY = LazyEviction(budget=30, window=8, alpha=0.05)
CHUNKS = {"chunk": 16, "carry": 8, "head": 2, "max_chunks": None}
EXACT = {
    "full": Full(),
    "delta": Delta.example(32),
    "lazy-eviction": LAZY,
    "louis-kv": LouisKV.example(32),
    "tidal-decode": METHODS["tidal-decode"].example(32),
    "delethink": Delethink(**CHUNKS),
    "streaming": Delethink(**CHUNKS, reset="streaming"),
    "rotate": Delethink(**CHUNKS, reset="rotate"),
    "delethink-lazy": Delethink(**CHUNKS | {"chunk": 40}, inner=LAZY),
}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def helper(llama):
    """Right at times: the other's first layers."""
    model = tiny_model("llama", num_hidden_layers=2)
    model.load_state_dict(llama.state_dict(), strict=False)
    return model


def generate(model, ids=IDS, **options):
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 1000} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("name", EXACT)
def test_tokens_are_those_without(llama, helper, name):
    with kvcomp.patch(llama, EXACT[name]) as run:
        plain = generate(llama)
        attended = run.report().tokens_attended
    for options in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": helper}):
        with kvcomp.patch(llama, EXACT[name]) as run:
            assert torch.equal(generate(llama, **options), plain)
            report = run.report()
        assert report.tokens_decoded == 39
        assert report.tokens_drafted > report.tokens_accepted
        assert report.tokens_attended < 2 * attended
    assert report.tokens_accepted, "the assistant was never right"


@pytest.mark.parametrize("method", [Full(), LAZY], ids=["full", "lazy"])
def test_beside_layers_with_a_cache_of_transformers(method):
    """Sliding layers take back by themselves what ours have never counted."""
    model = tiny_model("gemma3_text")
    with kvcomp.patch(model, method):
        plain = generate(model)
    with kvcomp.patch(model, method) as run:
        assert torch.equal(generate(model, prompt_lookup_num_tokens=5), plain)
        assert run.report().verifications


def test_a_second_turn_is_assisted(llama):
    options = {"return_dict_in_generate": True, "max_new_tokens": 20}
    with kvcomp.patch(llama, LAZY):
        first = generate(llama, **options)
        ids = torch.cat([first.sequences, PHRASE], 1)
        plain = generate(llama, ids, past_key_values=first.past_key_values, **options)
    options["prompt_lookup_num_tokens"] = 4
    with kvcomp.patch(llama, LAZY):
        again = generate(llama, **options)
        assert torch.equal(again.sequences, first.sequences)
        more = generate(llama, ids, past_key_values=again.past_key_values, **options)
    assert torch.equal(more.sequences, plain.sequences)


def interrupting(cache):
    """A logits processor: Ctrl-C between a forward over drafts and their commit."""

    def interrupt(ids, scores):
        if cache.kv.staged:
            raise KeyboardInterrupt
        return scores

    return interrupt


def test_an_interrupted_generation_leaves_no_drafts_to_the_next(llama):
    with kvcomp.patch(llama, LAZY) as run:
        plain, cache = generate(llama), run.new_cache()
        more = {"past_key_values": cache, "logits_processor": [interrupting(cache)]}
        with pytest.raises(KeyboardInterrupt):
            generate(llama, **more, prompt_lookup_num_tokens=4)
        assert not cache.kv.staged, "a bare forward may come next"
        ids = plain[:, : cache.get_seq_length() + 1]
        left = plain.shape[1] - ids.shape[1]
        again = generate(llama, ids, past_key_values=cache, max_new_tokens=left)
    assert torch.equal(again, plain)


def test_what_cannot_assist_is_refused(llama):
    """Before anything is decoded."""
    lookup = {"prompt_lookup_num_tokens": 3}
    for method, options, match in (
        (METHODS["h2o"](budget=32, window=1), lookup, "h2o cannot do: it evicts at every step"),
        (METHODS["lm-infinite"](budget=32), lookup, "lm-infinite cannot do"),
        (Full(), lookup | {"guidance_scale": 1.5}, "which remembers each step"),
        (Full(), {"assistant_early_exit": 2}, "fewer layers than it has"),
        (LAZY, {"assistant_model": llama}, "the patched model itself"),
        (Full(), {"assistant_model": tiny_model("llama", vocab_size=96)}, "different tokenizers"),
    ):
        with kvcomp.patch(llama, method) as run:
            with pytest.raises(ValueError, match=match):
                generate(llama, **options)
            assert not run.report().tokens_decoded
