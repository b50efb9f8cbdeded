"""Methods under Hugging Face models: `generate` in all its ways, and loops of one's own."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, TextStreamer

import kvcomp
from hf_batches import STEPS, generate, known_model, padded_batch
from kvcomp import METHODS, Delta, Full, LazyEviction, StreamingLLM
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
DENSE_DELTA = Delta(budget=256, page_size=16, recent=2, warmup=1)  # covers every context here
LAZY = LazyEviction(budget=24, window=7, alpha=0.02)
SPARSE_DELTA = Delta(budget=16, page_size=4, recent=2, warmup=1)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=6)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},  # transformers 5.4 wants an EOS here
        {"prefill_chunk_size": 5},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("method", [Full(), DENSE_DELTA], ids=["full", "delta"])
def test_ways_to_generate(llama, options, method):
    batch = padded_batch()
    if "prompt_lookup_num_tokens" in options:  # transformers: one sequence at a time
        batch = {name: tensor[1:] for name, tensor in batch.items()}
    torch.manual_seed(7)
    stock = generate(llama, batch, **options)
    with kvcomp.patch(llama, method):
        torch.manual_seed(7)
        assert torch.equal(generate(llama, batch, **options), stock)


@pytest.mark.parametrize("method", [Full(), LAZY, METHODS["louis-kv"].example(48)], ids=str)
def test_generate_leaves_no_cache_behind(llama, method, monkeypatch):
    """Its memory is free when it returns, and not when Python next looks for cycles."""
    caches, batch = [], padded_batch()
    with kvcomp.patch(llama, method) as run:
        new_cache = run.new_cache
        monkeypatch.setattr(
            run, "new_cache", lambda: caches.append(weakref.ref(cache := new_cache())) or cache
        )
        gc.collect()
        gc.disable()
        try:
            generate(llama, batch)
            assert len(caches) == 1 and caches[0]() is None
        finally:
            gc.enable()


def test_a_copied_cache_goes_on_by_itself(llama):
    """The recipe for prefix caching: fill once, deep-copy, continue each copy."""
    ids = padded_batch()["input_ids"][1:]
    mask = torch.ones_like(ids)
    stock = generate(llama, {"input_ids": ids, "attention_mask": mask})
    with kvcomp.patch(llama, Full()) as run, torch.no_grad():
        filled = run.new_cache()
        llama(ids[:, :12], past_key_values=filled)
        for _ in range(2):
            batch = {"input_ids": ids, "attention_mask": mask}
            out = generate(llama, batch, past_key_values=copy.deepcopy(filled))
            assert torch.equal(out, stock)


def test_arguments_by_position(llama):
    ids = padded_batch()["input_ids"][1:]
    with torch.no_grad():
        stock = llama.model(ids, torch.ones_like(ids)).last_hidden_state
        with kvcomp.patch(llama, Full(), linear_rows=False):  # which rounds otherwise than torch
            assert torch.equal(llama.model(ids, torch.ones_like(ids), None, None)[0], stock)


def test_a_prompt_of_one_token(llama):
    batch = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
    stock = generate(llama, batch)
    with kvcomp.patch(llama, Full()) as run:
        assert torch.equal(generate(llama, batch), stock)
    assert run.report().tokens_decoded == STEPS - 1


def test_attention_that_rearranges_after_the_cache_is_refused():
    model = tiny_model("diffllama")
    reasons = "after the cache|AttentionInterface"  # the second: transformers 5.4, at once
    with pytest.raises(ValueError, match=reasons), kvcomp.patch(model, Full()):
        generate(model, padded_batch())
    generate(model, padded_batch())


def test_layers_with_heads_of_different_sizes():
    model, batch = known_model("gemma4_text"), padded_batch()
    stock = generate(model, batch)
    for method in (Full(), DENSE_DELTA, dataclasses.replace(LAZY, budget=64)):
        with kvcomp.patch(model, method):
            assert torch.equal(generate(model, batch), stock), method
    with pytest.raises(ValueError, match="heads of size 48"):  # of the layers that keep all
        kvcomp.patch(tiny_model("gemma4_text", global_head_dim=48), Full())


def test_a_loop_of_ones_own(llama):
    ids = padded_batch()["input_ids"][1:]
    stock = generate(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with kvcomp.patch(llama, Full()) as run, torch.no_grad():
        cache, tokens = None, ids
        for _ in range(STEPS):
            out = llama(tokens, past_key_values=cache)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, tokens], 1)
            assert cache.get_seq_length() == ids.shape[1] - 1
    assert torch.equal(ids, stock)
    assert run.report().tokens_decoded == STEPS - 1


def test_streamer(llama, capsys):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(token)} " for token in ids)

    batch = {name: tensor[1:] for name, tensor in padded_batch().items()}
    generate(llama, batch, streamer=TextStreamer(Tokenizer()))
    stock = capsys.readouterr().out
    with kvcomp.patch(llama, Full()):
        generate(llama, batch, streamer=TextStreamer(Tokenizer()))
    assert capsys.readouterr().out == stock


def test_rows_through_the_cache_interface(llama):
    """What beam search and contrastive search do to a cache, then a step of each row by itself."""
    batch = padded_batch()

    def next_logits(change, rows):
        with kvcomp.patch(llama, Full()) as run, torch.no_grad():
            cache = run.new_cache()
            llama(**batch, past_key_values=cache)
            change(cache)
            positions = batch["attention_mask"].sum(1)[rows, None]
            out = llama(
                torch.full_like(positions, 9), position_ids=positions, past_key_values=cache
            )
        return out.logits[:, -1]

    plain = next_logits(lambda cache: None, [0, 1])

    for change, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ):
        got = next_logits(change, rows)
        torch.testing.assert_close(got, plain[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_tokens": 64}], ids=["dynamic", "static"])
def test_a_cache_without_its_patch_is_refused(llama, options):
    """The model's own attention would see nothing but the newest tokens."""
    batch = padded_batch()
    with kvcomp.patch(llama, Full(), **options) as run:
        cache = run.new_cache()
        with torch.no_grad():
            llama(**batch, past_key_values=cache)
    for ids in (batch["input_ids"], batch["input_ids"][:, :1]):
        with pytest.raises(ValueError, match="while it is patched"):
            llama(ids, past_key_values=cache)
    assert cache.kv.layers[0].columns == batch["input_ids"].shape[1]


def test_an_undone_run_is_not_entered_again(llama):
    with kvcomp.patch(llama, Full()) as run:
        pass
    with pytest.raises(RuntimeError, match="has been undone"), run:
        generate(llama, padded_batch())


def test_training_a_patched_model(llama):
    """Forwards without a cache, or over an empty one, have the gradients that they had."""
    batch = padded_batch()

    def gradients(**options):
        llama.zero_grad()
        llama(**batch, labels=batch["input_ids"], **options).loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters()]

    try:
        stock = gradients(use_cache=False)
        with kvcomp.patch(llama, SPARSE_DELTA):
            patched = [gradients(), gradients(use_cache=False)]
    finally:
        llama.zero_grad()
    for found in patched:
        assert all(map(torch.equal, found, stock))


def test_reset_starts_a_new_sequence(llama):
    ids = padded_batch()["input_ids"][1:]
    with kvcomp.patch(llama, Full()) as run, torch.no_grad():
        cache = run.new_cache()
        first = llama(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(llama(ids, past_key_values=cache).logits, first)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("random-")])
def test_rows_of_a_batch_do_not_touch_each_other(llama, name):
    """A padded row decodes as it does alone, under a budget far below its length."""
    batch = padded_batch(60, 11)
    never = {"eos_token_id": llama.config.vocab_size}  # delethink wants to know one
    with kvcomp.patch(llama, METHODS[name].example(16)):
        together = generate(llama, batch, **never)
        alone = {k: v[:1, 11:] for k, v in batch.items()}
        assert torch.equal(generate(llama, alone, **never)[0], together[0, 11:])


@pytest.mark.parametrize("unit", ["kv_head", "query_head"])
def test_a_second_turn_on_an_evicted_cache(llama, unit):
    """Rows of a padded batch as they are alone, and every token counts as seen."""
    method = dataclasses.replace(LAZY, unit=unit)
    extra = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))

    def conversation(batch, extra):
        first = generate(llama, batch, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, extra], 1)
        mask = torch.ones_like(ids)
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
        assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
        assert first.past_key_values.kv.layers[0].max_len <= 24 + 7
        second = {"input_ids": ids, "attention_mask": mask}
        return generate(llama, second, past_key_values=first.past_key_values)

    batch = padded_batch(40, 11)
    alone = {name: tensor[:1, 11:] for name, tensor in batch.items()}
    with kvcomp.patch(llama, method) as run:
        together = conversation(batch, extra)
        assert torch.equal(conversation(alone, extra[:1])[0], together[0, 11:])
    assert run.report().evictions > 0


def test_beams_over_an_evicting_cache(llama):
    batch = padded_batch(40, 11)
    with kvcomp.patch(llama, LAZY) as run:
        together = generate(llama, batch, num_beams=3)
        alone = {name: tensor[:1, 11:] for name, tensor in batch.items()}
        assert torch.equal(generate(llama, alone, num_beams=3)[0], together[0, 11:])
    assert run.report().kept_peak == 40 + 7
    assert run.report().evictions > 0


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "phi", "phi3", "granite", "gemma3_text"]
)
def test_keys_move_as_the_model_moves_them(kind):
    """A text of one token over and over: its keys differ by their rotation and nothing else."""
    model = known_model(kind)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.full((1, 40), 7), past_key_values=cache)
    run = kvcomp.patch(model, StreamingLLM())
    run.undo()
    full = [layer for layer in cache.layers if not layer.is_sliding]
    assert full
    for layer in full:
        keys = layer.keys[:, :, :1].clone()
        kvcomp.ops.rotate_keys(keys, torch.tensor([39]), run.inv_freq)
        torch.testing.assert_close(keys, layer.keys[:, :, 39:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["glm4", "cohere2", "smollm3"])
def test_another_kind_of_rotation_is_refused(kind):
    """Interleaved pairs, or layers without any."""
    model = known_model(kind)
    stock = generate(model, padded_batch())
    with pytest.raises(ValueError, match="StreamingLLM moves keys to other positions"):
        kvcomp.patch(model, StreamingLLM())
    assert torch.equal(generate(model, padded_batch()), stock)
    with kvcomp.patch(model, LAZY):
        generate(model, padded_batch())


def test_report_counts_what_the_formula_says(llama):
    """Delta over 6 layers, dense in 0, 1 and 3: counted figures against spec and cache sizes."""
    prompt, budget = 40, 16
    batch = {"input_ids": torch.randint(3, 128, (1, prompt))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with kvcomp.patch(llama, SPARSE_DELTA) as run:
        generate(llama, batch)
    report = run.report(layers=True)
    steps = STEPS - 1  # the first token comes from the prefill
    lengths = range(prompt + 1, prompt + STEPS)
    selected = sum(budget - 4 + (n - 1) % 4 + 1 for n in lengths)
    assert report.tokens_decoded == steps
    assert report.tokens_attended_dense == pytest.approx(sum(lengths) / steps)
    dense_layers = {0, 1, 3}
    for layer in report.layers:
        expected = sum(lengths) if layer["position"] in dense_layers else selected
        assert layer["tokens_attended"] == pytest.approx(expected / steps)
    token_bytes = 2 * 2 * 32 * 4  # K and V, 2 heads of 32 floats
    total = prompt + steps
    assert report.kv_bytes_kept == report.kv_bytes_dense == 6 * total * token_bytes
    assert report.kv_bytes_peak == report.kv_bytes_kept <= report.kv_bytes_allocated
    assert report.kv_bytes_read == (3 * sum(lengths) + 3 * selected) * token_bytes
    assert report.decode_seconds > 0
    assert report.to_dict()["attended_ratio"] == report.attended_ratio < 1
    assert "tokens/s" in str(report)


def test_an_exception_leaves_the_model_usable(llama):
    batch = padded_batch()
    stock = generate(llama, batch)

    def fail(*args):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), kvcomp.patch(llama, Full()):
        generate(llama, batch, logits_processor=[fail])
    assert torch.equal(generate(llama, batch), stock)
    assert "_kvcomp_run" not in llama.model.layers[0].self_attn.__dict__
    assert "_prepare_cache_for_generation" not in llama.__dict__
