"""Learned attention sinks: a logit per head that takes part in each softmax and brings no value."""

import pytest
import torch

import kvcomp
from kvcomp import METHODS, Delta
from kvcomp.cache import KVCache
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_outputs")
WIDTH, PAD, STEPS = 24, 9, 6


HYBRID = ("full_attention", "sliding_attention", *("full_attention",) * 3)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def model_with(std, kinds=HYBRID):
    model = tiny_model("gpt_oss", num_hidden_layers=len(kinds), layer_types=list(kinds))
    generator = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        sinks = layer.self_attn.sinks.data
        sinks.copy_(torch.randn(sinks.shape, generator=generator) * std)
    return model


@pytest.fixture(scope="module")
def model():
    return model_with(2.0)


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, 128, (2, WIDTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :PAD] = mask[0, :PAD] = 0
    return {"input_ids": ids, "attention_mask": mask}


def scores(model, batch):
    """Logits [steps, B, vocabulary] of a greedy answer."""
    given = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": 128}
    out = model.generate(**batch, **given, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits)


@pytest.fixture(scope="module")
def stock(model, batch):
    return scores(model, batch)


def test_they_matter_here(stock, batch):
    assert (scores(model_with(0.0), batch) - stock).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"streaming-llm", "lm-infinite"}))
def test_every_method_is_the_model_where_its_budget_covers_all(model, batch, stock, name):
    with kvcomp.patch(model, METHODS[name].example(256)):
        torch.testing.assert_close(scores(model, batch), stock, **CLOSE)


@pytest.mark.parametrize("pieces", [(16, 8), (16, 5, 3)])
def test_a_prompt_in_pieces(model, batch, stock, pieces):
    """Several new tokens over a filled cache, of rows without padding."""
    with kvcomp.patch(model, kvcomp.Full()) as run, torch.no_grad():
        cache = run.new_cache()
        for part in batch["input_ids"][1:].split(pieces, 1):
            last = model(part, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, stock[0, 1:], **CLOSE)


def test_static(batch):
    model = model_with(2.0, ("full_attention",) * 3)
    want = scores(model, batch)
    for method in kvcomp.Full(), METHODS["lazy-eviction"].example(256):
        with kvcomp.patch(model, method, max_tokens=64):
            torch.testing.assert_close(scores(model, batch), want, **CLOSE)


@pytest.fixture
def layer():
    """A layer of 40 tokens with sinks, 4 query heads over 2 KV heads, and a query."""
    generator = torch.Generator().manual_seed(3)
    cache = KVCache(Delta(budget=16, page_size=4, recent=1, warmup=1, delta_layers=(1,)), 3)
    for layer in cache.layers:
        k, v = (torch.randn(2, 2, 40, 32, generator=generator) for _ in "kv")
        layer.append(k, v)
        cache.prefill(layer, torch.randn(2, 4, 40, 32, generator=generator), 0.3)
        layer.sinks = torch.randn(4, generator=generator)
    layer = cache.layers[1]
    layer.cache_itself = cache  # or it would be gone
    return layer, torch.randn(2, 4, 32, generator=generator)


def probabilities(layer, q):
    """[B, Hq, 40], and of the sinks [B, Hq, 1]."""
    keys = layer.keys[:, :, :40].repeat_interleave(2, 1)
    logits = (keys @ q[..., None])[..., 0] * 0.3
    return (
        torch.cat([logits, layer.sinks.expand(2, 4)[..., None]], -1).softmax(-1).split((40, 1), -1)
    )


def test_attention_and_its_lse(layer):
    layer, q = layer
    logits = torch.empty(2, 4, layer.capacity)
    out, lse = layer.attend(q, 0.3, logits=logits)
    probs, _ = probabilities(layer, q)
    values = layer.values[:, :, :40].repeat_interleave(2, 1)
    torch.testing.assert_close(out, (probs[:, :, None] @ values)[:, :, 0])
    torch.testing.assert_close((logits[..., :40] - lse[..., None]).exp(), probs)


def test_delta_scores_what_is_left_beside_them(layer):
    """The max over heads is of probabilities that sinks have taken their share of."""
    layer, q = layer
    layer.sinks = torch.tensor([-5.0, 9.0, -5.0, 9.0])  # two heads have nothing to say
    cache = layer.cache_itself
    cache.attend(layer, q, 0.3)
    probs, _ = probabilities(layer, q)
    pages = probs.amax(1).unflatten(-1, (10, 4)).sum(-1)
    pages[:, [0, -1]] = torch.inf  # the first and the newest
    want = pages.topk(4).indices.sort(-1).values.int()
    assert torch.equal(cache.state.pages[0][:, 0], want)
    unaware = (layer.keys[:, :, :40].repeat_interleave(2, 1) @ q[..., None])[..., 0] * 0.3
    pages = unaware.softmax(-1).amax(1).unflatten(-1, (10, 4)).sum(-1)
    pages[:, [0, -1]] = torch.inf
    assert not torch.equal(pages.topk(4).indices.sort(-1).values.int(), want)
