"""Retrieval methods under `generate`: whole turns, small budgets, pools of several kinds."""

import copy
import dataclasses

import pytest
import torch

import kvcomp
from hf_batches import RETRIEVALS, generate, known_model, padded_batch
from kvcomp import METHODS, LouisKV
from kvcomp.cache import HostMemoryError
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=6)


# Retrieval from host memory.


def two_turns(model, batch, copies=False):
    """Both answers of a conversation; the second also on a copy of the cache, if wanted."""
    extra = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))
    first = generate(model, batch, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, extra[: len(first.sequences)]], 1)
    mask = torch.ones_like(ids)
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    second = {"input_ids": ids, "attention_mask": mask}
    copied = copy.deepcopy(first.past_key_values) if copies else None
    out = generate(model, second, past_key_values=first.past_key_values)
    if copies:
        assert torch.equal(generate(model, second, past_key_values=copied), out)
    return out


@pytest.fixture(scope="module")
def stock_turns(llama):
    return two_turns(llama, padded_batch(60, 11))


@pytest.mark.parametrize("name", RETRIEVALS)
def test_all_retrieved_is_stock_generate(llama, name, stock_turns):
    """A left-padded batch, two turns: prompt and answer go to the host and come back."""
    with kvcomp.patch(llama, METHODS[name].example(256)) as run:
        assert torch.equal(two_turns(llama, padded_batch(60, 11)), stock_turns)
    assert int(sum(run.meter.fetched_rows)) > 1000


@pytest.mark.parametrize("name", RETRIEVALS)
def test_new_tokens_attend_to_what_is_only_in_the_pool(llama, name):
    """A prompt in three pieces under a small budget: the logits of stock attention."""
    batch = padded_batch(60, 11)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        stock = llama(**batch, position_ids=positions).logits
        with kvcomp.patch(llama, METHODS[name].example(16)) as run:
            cache = run.new_cache()
            for first, last in ((0, 30), (30, 32), (32, 60)):
                out = llama(
                    ids[:, first:last],
                    attention_mask=mask[:, :last],
                    position_ids=positions[:, first:last],
                    past_key_values=cache,
                ).logits
                held = [layer.max_len for layer in cache.kv.layers]
                assert held[0] == last and max(held[1:]) <= 16
                valid = mask[:, first:last].bool()
                torch.testing.assert_close(
                    out[valid], stock[:, first:last][valid], rtol=1e-3, atol=1e-3
                )


@pytest.mark.parametrize("name", RETRIEVALS)
def test_a_second_turn_under_a_small_budget(llama, name):
    """Rows of a padded batch as they are alone, also when copied in between."""
    batch = padded_batch(40, 11)
    alone = {name: tensor[:1, 11:] for name, tensor in batch.items()}
    with kvcomp.patch(llama, METHODS[name].example(16)):
        together = two_turns(llama, batch, copies=True)
        assert torch.equal(two_turns(llama, alone)[0], together[0, 11:])


@pytest.mark.parametrize("name", RETRIEVALS)
def test_a_row_with_fewer_tokens_than_sinks(llama, name):
    """It is dense until it has enough, its neighbour is as it is alone, and pieces may be short."""
    batch = padded_batch(60, 57)
    alone = {name: tensor[1:] for name, tensor in batch.items()}
    stock = generate(llama, batch)
    with kvcomp.patch(llama, METHODS[name].example(256)):  # 8 sinks
        assert torch.equal(generate(llama, batch), stock)
        assert torch.equal(generate(llama, batch, prefill_chunk_size=7), stock)
    with kvcomp.patch(llama, METHODS[name].example(16)):
        assert torch.equal(generate(llama, batch)[1:], generate(llama, alone))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 5},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("name", ["louis-kv", "cluster-kv"])
def test_ways_to_generate_with_a_pool(llama, name, options):
    batch = padded_batch(30, 6)
    torch.manual_seed(7)
    stock = generate(llama, batch, **options)
    with kvcomp.patch(llama, METHODS[name].example(256)):  # a chunk may be all padding
        torch.manual_seed(7)
        assert torch.equal(generate(llama, batch, **options), stock)
    if "num_beams" in options:
        alone = {name: tensor[:1, 6:] for name, tensor in batch.items()}
        with kvcomp.patch(llama, METHODS[name].example(16)):
            together = generate(llama, batch, **options)
            rows = options.get("num_return_sequences", 1)
            assert torch.equal(generate(llama, alone, **options), together[:rows, 6:])


@pytest.mark.parametrize("name", RETRIEVALS)
def test_a_filled_cache_can_be_copied(llama, name):
    """The recipe for prefix caching, with work still under way in the background."""
    ids = padded_batch(60)["input_ids"][1:]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with kvcomp.patch(llama, METHODS[name].example(16)) as run, torch.no_grad():
        filled = run.new_cache()
        llama(ids[:, :50], past_key_values=filled)
        outs = [generate(llama, batch, past_key_values=copy.deepcopy(filled)) for _ in range(2)]
        assert torch.equal(*outs)
        assert torch.equal(generate(llama, batch, past_key_values=filled), outs[0])


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3"])
def test_a_pool_for_half_floats_and_hybrid_layers(kind):
    model = known_model(kind).bfloat16()
    batch = padded_batch(60, 11)
    alone = {name: tensor[1:] for name, tensor in batch.items()}
    with kvcomp.patch(model, LouisKV.example(24)) as run:
        together = generate(model, batch)
        assert torch.equal(generate(model, alone)[0], together[1])
    assert int(sum(run.meter.fetched_rows)) > 0


def test_refused_host_memory_leaves_the_model_unpatched(llama):
    """At the prompt, and at a step in the middle; nobody has to call undo()."""
    batch = padded_batch()
    stock, implementation = generate(llama, batch), llama.config._attn_implementation
    method = LouisKV.example(64)
    with kvcomp.patch(llama, method) as run:
        generate(llama, batch, max_new_tokens=260)
    enough = run.report().host_bytes_peak
    for limit, least in ((1000, 0), (enough - 1, 21)):
        seen = []
        run = kvcomp.patch(llama, dataclasses.replace(method, host_limit=limit))
        with pytest.raises(HostMemoryError, match=f"limit of {limit} bytes"):
            seen.append(run.new_cache())
            generate(llama, batch, max_new_tokens=260, past_key_values=seen[0])
        assert seen[0].get_seq_length() >= least  # the second limit is reached while decoding
        assert llama.config._attn_implementation == implementation
        assert torch.equal(generate(llama, batch), stock)
        run.undo()
