"""Methods under Hugging Face models: `generate` in all its ways, and loops of one's own."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

import kvcomp
from kvcomp import METHODS, Delta, Full, LazyEviction, LouisKV, StreamingLLM, reasoner
from kvcomp.cache import HostMemoryError
from kvcomp.hf import answer_loss, decode_all
from kvcomp.hf.calibrate import better
from kvcomp.hf.decode import answer_losses
from kvcomp.hf.recorders import PageRecorder
from kvcomp.methods.retrieval import Retrieval
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24
DENSE_DELTA = Delta(budget=256, page_size=16, recent=2, warmup=1)  # covers every context here
LAZY = LazyEviction(budget=24, window=7, alpha=0.02)
RETRIEVALS = [name for name, method in METHODS.items() if issubclass(method, Retrieval)]
SPARSE_DELTA = Delta(budget=16, page_size=4, recent=2, warmup=1)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=6)


def padded_batch(width=21, pad=6):
    """Token ids [2, width] and their mask; the first row is left-padded by `pad`."""
    ids = torch.randint(3, 128, (2, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :pad] = mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch, **options):
    return model.generate(**batch, **{"max_new_tokens": STEPS, "do_sample": False, **options})


def known_model(kind):
    """A tiny model; skips where an older transformers cannot make it."""
    try:
        return tiny_model(kind)
    except ValueError as unknown:
        if version.parse(transformers.__version__) >= version.parse("5.17"):
            raise
        pytest.skip(str(unknown)[:80])


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


def test_calibrate_finds_the_layer_that_points_and_the_one_that_reads():
    """The reasoner's layer 2 points at the facts and layer 5 reads them: one serves the other."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    prompts = [reasoner.task.make_problem(nodes=24, steps=60, seed=seed).prompt for seed in (1, 2)]
    method = Delta(budget=64, page_size=4, recent=2)
    recorder = PageRecorder(method, every=10)
    decode_all(model, prompts, recorder, tokenizer=tokenizer, max_new_tokens=120)
    recall = torch.stack(recorder.recalls).mean(0)
    assert torch.allclose(recall.diagonal(), torch.ones(8))
    assert recall[:5, 5].argmax() == 2
    assert recall[2, 5] > recall[[0, 1, 3, 4], 5].max() + 0.1


def test_calibrate_returns_a_delta_that_fits(llama):
    prompts = [list(range(3, 60)), list(range(90, 20, -1))]
    found = Delta.calibrate(
        llama, prompts, num_delta=2, max_new_tokens=20, every=5, budget=16, page_size=4, recent=2
    )
    assert found.delta_layers[0] == found.warmup == 2
    assert len(found.delta_layers) == 2
    found.check(6)


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


def test_calibrate_finds_the_hits_that_matter_to_lazy_eviction():
    """On the reasoner, whose idle heads spread thin, a low alpha calls every token important."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    problem = reasoner.task.make_problem(nodes=32, steps=70, seed=1, live=4)
    found = LazyEviction.calibrate(
        model,
        [problem.prompt],
        tokenizer=tokenizer,
        max_new_tokens=280,
        budget=96,
        alphas=(1e-4, 0.2),
    )
    assert found.alpha in (None, 0.2)  # None is 1 / budget, which is tried beside them
    assert found == LazyEviction(budget=96, window=found.window, alpha=found.alpha)
    assert 1 <= found.window <= 24
    given = torch.tensor(tokenizer(problem.gold())["input_ids"])[-280:]
    low, high = (
        answer_loss(model, [problem.prompt], [given], method, tokenizer=tokenizer)
        for method in (LazyEviction(budget=96, window=24, alpha=1e-4), found)
    )
    dense = answer_loss(model, [problem.prompt], [given], Full(), tokenizer=tokenizer)
    assert dense < high < low


def test_calibrate_keeps_the_default_unless_another_is_clearly_better():
    default, lucky, good = (LazyEviction(budget=32, window=w) for w in (8, 4, 2))
    noise = torch.randn(64 * 24, generator=torch.Generator().manual_seed(0))
    even = (torch.arange(len(noise)) // 64 % 2 == 0).float()
    losses = {default: 2 + noise, lucky: 2 + noise - 0.5 * even, good: 1.9 + noise}
    assert better(default, [default], lambda method: [losses[method]]) == default
    assert better(default, [lucky], lambda method: [losses[method]]) == default  # not confirmed
    assert better(default, [good], lambda method: list(losses[method].split(500))) == good
    losses[good] = 1.99 + noise.flip(0)  # no more than chance explains
    assert better(default, [good], lambda method: [losses[method]]) == default


def test_calibrations_read_given_answers(llama):
    prompts = [list(range(3, 30)), list(range(90, 63, -1)), [5, 6, 7]]
    answers = [torch.arange(40, 70), torch.arange(20, 50), torch.arange(99, 59, -1)]
    fields = {"budget": 16, "window": 4}
    found = answer_losses(llama, prompts, answers, LazyEviction(**fields))
    single = [
        answer_loss(llama, [prompt], [answer], LazyEviction(**fields))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert torch.allclose(torch.stack([x.mean() for x in found]), torch.tensor(single), atol=1e-4)
    pages = {"budget": 16, "page_size": 4, "recent": 2, "num_delta": 1, "every": 5}
    assert Delta.calibrate(llama, prompts, answers=answers, **pages).delta_layers == (2,)
    lazy = LazyEviction.calibrate(llama, prompts, answers=answers, alphas=(0.05,), budget=16)
    assert lazy.budget == 16 and lazy.window <= 4
    tau = LouisKV.calibrate(llama, prompts, answers=answers, budget=16, local=4, sinks=1).tau
    assert -1 <= tau <= 1


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


def test_calibrate_finds_the_similarity_below_which_a_share_of_the_steps_lies(llama):
    prompts = [list(range(3, 60)), list(range(90, 20, -1))]
    fields = {"budget": 200, "sinks": 4, "local": 16, "segment": (1, 1000), "dense_layers": 1}
    found = LouisKV.calibrate(llama, prompts, rate=0.3, max_new_tokens=30, **fields)
    assert found == LouisKV(tau=found.tau, **fields)
    with kvcomp.patch(llama, found) as run:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            generate(llama, batch, max_new_tokens=30)
    steps = 2 * (30 - 2) * 5  # an answer's first step has nothing to compare with
    retrievals = int(sum(run.meter.retrievals)) - 2 * 5
    assert retrievals / steps == pytest.approx(0.3, abs=0.03)


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
