"""Models that hold a text decoder beside towers for images, decoded for text."""

import functools

import pytest
import torch
from transformers import AutoModelForImageTextToText

import every_model
import kvcomp
from kvcomp import Delethink, Delta, Full, thinking
from padded import COVERING, IDS, MASK, NEVER, PAD, STEPS, WIDTH, generate
from slow import delethink as slow_delethink

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    "mistral3",  # Mistral 3, Magistral, Ministral 3
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",  # hybrid
    "glm4v_moe",
    "exaone4_5",  # sliding hybrid; counts padding in positions
    "gemma3",  # makes the masks, one for each kind of layer
    "step3p7",
    "paligemma",  # positions begin at 1
]
IMAGE = torch.zeros(1, 3, 32, 32)


@functools.cache
def model_of(kind):
    return every_model.tiny(AutoModelForImageTextToText, kind)


@functools.cache
def stock_of(kind):
    return generate(model_of(kind))


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_the_model(kind, name):
    model, stock = model_of(kind), stock_of(kind)
    assert stock[:, WIDTH:].unique().numel() > 4, "the model is degenerate"
    with kvcomp.patch(model, COVERING[name]) as run:
        assert torch.equal(generate(model), stock)
    assert run.report().tokens_decoded == 2 * (STEPS - 1)
    assert torch.equal(generate(model), stock), "undo left something behind"


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "exaone4_5"])
def test_delethink_goes_through_chunks(kind):
    """As the paper's loop around the wrapper's own `generate`."""
    model, method = model_of(kind), Delethink(8, 3, head=2, max_chunks=None)
    alone = IDS[:1, PAD:]
    respond = slow_delethink.stock(model, do_sample=False, eos_token_id=NEVER)
    want = slow_delethink.think(method, alone, respond, 30)
    with kvcomp.patch(model, method) as run:
        out = generate(model, max_new_tokens=30)
    assert torch.equal(out[:1, WIDTH:], want)
    assert run.report().boundaries > 2


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
@pytest.mark.parametrize("name", ["delta", "lazy-eviction"])
def test_small_budgets_are_felt_and_rows_are_independent(kind, name):
    model, small = model_of(kind), type(COVERING[name]).example(8)
    with kvcomp.patch(model, small) as run:
        out = generate(model)
        alone = generate(model, IDS[:1, PAD:], MASK[:1, PAD:])
    assert run.report().attended_ratio < 1
    assert torch.equal(out[:1, PAD:], alone)


@pytest.mark.parametrize("kind", ["mistral3", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("name", ["full", "delethink"])
def test_an_image_is_refused_and_the_model_goes_on(kind, name):
    model, stock = model_of(kind), stock_of(kind)
    before = model.config.get_text_config()._attn_implementation
    towers = model.config.vision_config._attn_implementation
    with kvcomp.patch(model, COVERING[name]):
        for given in ({"pixel_values": IMAGE}, {"mm_encoder_outputs": {"image": IMAGE}}):
            with pytest.raises(ValueError, match="decodes text alone while it is patched"):
                model(input_ids=IDS, attention_mask=MASK, **given)
        assert model.config.vision_config._attn_implementation == towers
        assert torch.equal(generate(model), stock)
    assert model.config.get_text_config()._attn_implementation == before


def test_token_types_of_an_image_are_refused():
    model = model_of("gemma3")
    with kvcomp.patch(model, Full()):
        assert torch.equal(
            generate(model, token_type_ids=torch.zeros_like(IDS)), stock_of("gemma3")
        )
        with pytest.raises(ValueError, match=r"token_type_ids.*text alone"):
            generate(model, token_type_ids=torch.ones_like(IDS))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("name", ["full", "delta"])
def test_a_second_turn_goes_on_with_the_cache(kind, name):
    """The text of both turns at once gives the same tokens."""
    model = model_of(kind)
    ids, mask = IDS[:1, PAD:], MASK[:1, PAD:]
    with kvcomp.patch(model, COVERING[name]):
        first = generate(model, ids, mask, return_dict_in_generate=True)
        both = torch.cat([first.sequences, IDS[1:, :5]], 1)
        out = generate(model, both, torch.ones_like(both), past_key_values=first.past_key_values)
    assert torch.equal(out, generate(model, both, torch.ones_like(both)))


def test_a_forward_without_a_cache_is_the_model_s_own():
    model = model_of("gemma3")
    want = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    with kvcomp.patch(model, Full()):
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits, want)


def test_a_preallocated_cache_and_a_compiled_step():
    model, stock = model_of("mistral3"), stock_of("mistral3")
    with kvcomp.patch(model, Delta.example(256), max_tokens=64) as run:
        assert torch.equal(generate(model), stock)
        step, cache = run.compile(backend="eager", fullgraph=True), run.new_cache()
        ids = IDS[1:]
        with torch.no_grad():
            for _ in range(STEPS):
                logits = step(ids if cache.columns == 0 else ids[:, -1:], past_key_values=cache)
                ids = torch.cat([ids, logits.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, stock[1:])


def test_a_generate_of_its_own_is_refused_with_what_to_patch():
    model = every_model.tiny(AutoModelForImageTextToText, "blip-2")
    with pytest.raises(ValueError, match="patch its text model instead"):
        kvcomp.patch(model, Full())


@pytest.mark.parametrize("kind", ["paligemma", "exaone4_5"])
def test_drafts_and_rows_have_the_positions_of_the_model(kind):
    """They begin at 1 in PaliGemma, and count padding in Exaone 4.5."""
    model, stock = model_of(kind), stock_of(kind)
    stand = thinking.Stand(sure=0.0, adapt=False)
    with kvcomp.patch(model, Full()) as run:
        assert torch.equal(generate(model, custom_generate=stand), stock)
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        drawn = thinking.Sampling(temperature=0, max_new_tokens=STEPS)
        rows = thinking.Rows(run, inputs, drawn, copies=2, eos=())
        rows.finish()
    found = torch.tensor([row.ids for row in rows.all])
    assert torch.equal(found, stock[:, WIDTH:].repeat_interleave(2, 0))
