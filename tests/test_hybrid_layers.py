"""Layers that hold K and V and the states of a linear layer: the method manages the former."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

import every_model
import kvcomp
from kvcomp import Delta, Full, LazyEviction
from kvcomp.hf.hybrid_layer import HybridLayer
from padded import COVERING, IDS, WIDTH, generate

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def model_of(kind):
    return every_model.tiny(AutoModelForCausalLM, kind)


@functools.cache
def stock_of(kind):
    return generate(model_of(kind))


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("kind", ["falcon_h1", "zaya", "zamba2"])
def test_tokens_are_those_of_the_model(kind, name):
    model, stock = model_of(kind), stock_of(kind)
    assert stock[:, WIDTH:].unique().numel() > 4, "the model is degenerate"
    with kvcomp.patch(model, COVERING[name]) as run:
        assert torch.equal(generate(model), stock)
    assert run.report().attended_ratio == pytest.approx(1)
    assert torch.equal(generate(model), stock), "undo left something behind"


def test_states_follow_the_beams():
    model = model_of("falcon_h1")
    stock = generate(model, num_beams=3)
    with kvcomp.patch(model, Delta.example(256)):
        assert torch.equal(generate(model, num_beams=3), stock)


def test_a_small_budget_is_felt():
    model, stock = model_of("falcon_h1"), stock_of("falcon_h1")
    with kvcomp.patch(model, LazyEviction.example(8)) as run:
        assert not torch.equal(generate(model), stock)
    assert run.report().attended_ratio < 1


def test_tokens_are_not_taken_back():
    model = model_of("falcon_h1")
    with kvcomp.patch(model, Full()) as run, torch.no_grad():
        cache = run.new_cache()
        model(IDS, past_key_values=cache)
        assert all(type(layer) is HybridLayer for layer in cache.layers)
        with pytest.raises(ValueError, match="cannot take tokens back"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="cannot take tokens back"):
            cache.stage()
        again = run.continue_from(cache, IDS)
        assert again.get_seq_length() == 0, "it begins anew"
    with pytest.raises(ValueError, match="cannot use a static cache"):
        kvcomp.patch(model, Full(), max_tokens=64)
