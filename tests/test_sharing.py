"""Layers that have no K and V of their own, and heads of 512: Gemma 4 as its checkpoints are."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import every_model
import kvcomp
import padded
from kvcomp import METHODS, Delethink, Full, thinking
from padded import IDS, MASK, NEVER, PAD, WIDTH, generate
from slow import delethink as slow_delethink

pytestmark = pytest.mark.usefixtures("one_thread")

FULL, SLIDING = "full_attention", "sliding_attention"
SHARING = {  # the last four layers attend to what the last of each kind before them has
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, FULL, FULL, FULL, SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 4,
}
COVERING = {**padded.COVERING, **{x: METHODS[x].example(256) for x in ("quest", "h2o")}}


@functools.cache
def gemma4(wrapped=False):
    if wrapped:
        text = every_model.tiny_config("gemma4").text_config
        text = every_model.shrunken(text, **SHARING)
        return every_model.tiny(AutoModelForImageTextToText, "gemma4", text_config=text)
    return every_model.tiny(AutoModelForCausalLM, "gemma4_text", **SHARING)


@functools.cache
def stock_of(wrapped):
    return generate(gemma4(wrapped))


@pytest.mark.parametrize("wrapped", [False, True], ids=["text", "wrapper"])
@pytest.mark.parametrize("name", COVERING)
def test_tokens_are_those_of_the_model(name, wrapped):
    model, stock = gemma4(wrapped), stock_of(wrapped)
    assert stock[:, WIDTH:].unique().numel() > 4, "the model is degenerate"
    with kvcomp.patch(model, COVERING[name]) as run:
        assert torch.equal(generate(model), stock)
    report = run.report(layers=True)
    assert report.attended_ratio == pytest.approx(1)
    assert len(report.layers) == 3, "layers that share hold nothing"
    assert torch.equal(generate(model), stock), "undo left something behind"


def test_full_layers_have_heads_of_512():
    cache = kvcomp.patch(gemma4(), Full())
    with cache as run, torch.no_grad():
        gemma4()(IDS, past_key_values=(cache := run.new_cache()))
    assert {kv.keys.shape[-1] for kv in cache.kv.layers} == {512}


def test_a_small_budget_is_felt_and_padding_is_not():
    model, small = gemma4(), METHODS["quest"].example(8)
    with kvcomp.patch(model, small) as run:
        out = generate(model)
        alone = generate(model, IDS[:1, PAD:], MASK[:1, PAD:])
    assert run.report().attended_ratio < 1
    assert torch.equal(out[:1, PAD:], alone)
    assert not torch.equal(out, stock_of(False))


@pytest.mark.parametrize("name", ["full", "delta", "louis-kv"])
def test_a_second_turn_goes_on_with_the_cache(name):
    """Queries of the layers that share may be those of the last new token alone."""
    model, turn = gemma4(), IDS[1:, :5].expand(2, -1)
    with kvcomp.patch(model, COVERING[name]):
        first = generate(model, return_dict_in_generate=True)
        both = torch.cat([first.sequences, turn], 1)
        mask = torch.nn.functional.pad(MASK, (0, both.shape[1] - WIDTH), value=1)
        out = generate(model, both, mask, past_key_values=first.past_key_values)
    assert torch.equal(out, generate(model, both, mask))


def test_delethink_goes_through_chunks():
    model, method = gemma4(True), Delethink(8, 3, head=2, max_chunks=None)
    respond = slow_delethink.stock(model, do_sample=False, eos_token_id=NEVER)
    want = slow_delethink.think(method, IDS[:1, PAD:], respond, 30)
    with kvcomp.patch(model, method):
        assert torch.equal(generate(model, max_new_tokens=30)[:1, WIDTH:], want)


def test_k_and_v_from_nowhere_are_refused(monkeypatch):
    """A layer without K and V of its own, which gets others than those of a layer of ours."""
    model = gemma4()
    with kvcomp.patch(model, Full()) as run:
        cache = run.new_cache()
        monkeypatch.setattr(cache, "source", lambda key: None)
        with torch.no_grad(), pytest.raises(ValueError, match="that no layer of the cache has"):
            model(IDS, past_key_values=cache)


def test_drafts_are_refused():
    model = gemma4()
    with kvcomp.patch(model, Full()):
        for way in ({"custom_generate": thinking.Stand()}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(ValueError, match="layers of the model share K and V"):
                generate(model, IDS[1:], MASK[1:], **way)
