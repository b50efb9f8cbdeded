"""Delethink under `generate`, against slow readings of the paper."""

import itertools

import pytest
import torch
import transformers
from packaging import version
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

import kvcomp
from delethink_texts import (
    NEVER,
    SCHEDULES,
    SHORT,
    assert_close,
    dictate,
    generate,
    method_of,
    questions,
    ragged,
    slow_greedy,
    slow_logits,
    some_output,
)
from kvcomp import Delethink
from kvcomp.cache.background import Background
from kvcomp.testing.models import ARCHITECTURES, tiny_model
from slow import delethink as slow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=3)


def known_model(kind):
    """A tiny model; skips where an older transformers cannot make it, or has its own cache."""
    try:
        model = tiny_model(kind)
    except ValueError as unknown:
        if version.parse(transformers.__version__) >= version.parse("5.17"):
            raise
        pytest.skip(str(unknown)[:80])
    if not model._supports_default_dynamic_cache():
        pytest.skip("a cache class of its own")
    return model


# --- the schedule -----------------------------------------------------------------------------


def test_budgets():
    assert Delethink().budget == 24_576
    assert Delethink(max_chunks=23).budget == 98_304
    assert Delethink(max_chunks=31).budget == 131_072
    assert Delethink(max_chunks=1).budget == 8192
    assert Delethink(max_chunks=None).budget is None


@pytest.mark.parametrize("variant", ["exact_bound", "paper"])
def test_every_chunk_is_what_the_loop_of_the_paper_makes(variant):
    """All small settings; question and output are numbers, so that each names its place."""
    question, tokens = torch.tensor([[-2, -1]]), 40
    output = torch.arange(tokens)[None]
    for carry, chunk in itertools.combinations(range(1, 12), 2):
        for head in range(carry if variant == "exact_bound" else chunk):
            method = Delethink(chunk, carry, max_chunks=4, head=head, variant=variant)
            most = min(tokens, method.budget)
            contexts = slow.chunks(method, question, slow.dictated(output), most)
            assert sum(response.shape[1] for _, response in contexts) == most
            for index, (prompt, response) in enumerate(contexts):
                at = method.chunk_at(index)
                carried = [*range(at.head), *range(at.carried, at.start)]
                assert prompt[0].tolist() == [-2, -1, *carried], method
                assert response[0].tolist() == list(range(at.start, at.stop))[: tokens - at.start]
                assert prompt.shape[1] + response.shape[1] <= 2 + method.most_thought
            assert method.chunk_at(4) is None


# --- against the slow reading -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "piece"), list(zip(SCHEDULES, itertools.cycle((1, 3, 50)), strict=False))
)
def test_logits_are_those_of_a_cold_run_on_the_ids(llama, schedule, piece, monkeypatch):
    """Every step of every chunk, ragged rows, and what the layers hold in between."""
    monkeypatch.setattr(Background, "busy", False)  # pieces as soon as they are known
    batch, output = ragged(9, 14, 11), some_output(3, 40)
    lens = batch["attention_mask"].sum(1)
    expected = slow_logits(method_of(schedule), batch, output, slow.plain(llama))
    for fields in ({}, {"reset": "streaming", "piece": piece}):
        method = method_of(schedule, **fields)
        prefixes = []

        def look(cache, step, method=method, prefixes=prefixes):
            assert cache.get_seq_length() == 14 + step
            for layer in cache.context.kv.layers:
                assert (layer.logical_lens <= lens + method.most_thought).all()
                assert torch.equal(layer.seq_lens, layer.logical_lens)
                assert layer.columns <= 14 + method.most_thought
            if step >= method.head:
                prefixes.append(
                    [
                        [x[row, :, : n + method.head].clone() for x in (layer.keys, layer.values)]
                        for layer in cache.context.kv.layers
                        for row, n in enumerate(lens.tolist())
                    ]
                )

        with kvcomp.patch(llama, method) as run:
            assert_close(dictate(llama, run, batch, output, look), expected)
        for later in prefixes[1:]:
            for pair, first in zip(later, prefixes[0], strict=True):
                assert all(map(torch.equal, pair, first)), "the prefix has changed"
        contexts = slow.chunks(method, questions(batch)[0], slow.dictated(output[:1]), 40)
        boundaries = len(contexts) - 1
        report = run.report()
        assert report.boundaries == boundaries == len(run.meter.boundary_seconds) > 1
        assert report.tokens_reencoded == 3 * boundaries * (method.tail - 1)
        assert report.tokens_decoded == 3 * 39


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_next", "phi", "cohere2"])
def test_logits_of_other_architectures(kind):
    """Hybrids encode each context as a whole; Phi turns a part of its heads."""
    model = known_model(kind)
    batch, output = ragged(19, 23), some_output(2, 33)
    expected = None
    for fields in ({}, {"reset": "streaming", "piece": 3}):
        method = method_of("carry-below-half", **fields)
        if expected is None:
            expected = slow_logits(method, batch, output, slow.plain(model))
        with kvcomp.patch(model, method) as run:
            got = dictate(model, run, batch, output)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_tokens_are_those_of_the_loop(kind):
    model = known_model(kind)
    batch, method = ragged(9, 14), method_of("carry-over-half")
    before = generate(model, batch, 3)
    with kvcomp.patch(model, method) as run:
        together = generate(model, batch, 20)
    assert run.report().boundaries == 3
    assert torch.equal(together, slow_greedy(model, method, batch, 20))
    assert torch.equal(generate(model, batch, 3), before), "undo left something behind"


@pytest.mark.parametrize(
    ("schedule", "reset"),
    [("carry-below-half", "prefill"), ("carry-1", "streaming"), ("paper-overlap", "streaming")],
)
def test_greedy_tokens_of_a_ragged_batch(llama, schedule, reset):
    batch, method = ragged(9, 14, 11), method_of(schedule, reset=reset, piece=2)
    with kvcomp.patch(llama, method):
        first = generate(llama, batch, 30)
        again = generate(llama, batch, 30, prefill_chunk_size=5)  # a second one in the same run
    assert torch.equal(first, slow_greedy(llama, method, batch, 30))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [*(("llama", schedule) for schedule in SCHEDULES), ("phi", "paper"), ("phi", "paper-overlap")],
)
def test_rotated_contexts(kind, schedule):
    """Against the model's own cache, cut and turned by hand in float64."""
    model = tiny_model(kind, num_hidden_layers=3)
    method, batch = method_of(schedule, reset="rotate"), ragged(9, 14)
    output = some_output(2, 36)
    with kvcomp.patch(model, method) as run:
        got = dictate(model, run, batch, output)
        inv_freq = run.inv_freq
    rows = zip(questions(batch), output.split(1), strict=True)
    want = torch.cat([slow.rotated(model, method, *row, inv_freq) for row in rows])
    assert_close(got, want)
    assert run.report().tokens_reencoded == 0 < run.report().boundaries


def test_rotating_is_exact_in_the_first_layer_and_nowhere_else(llama):
    batch, output = ragged(9, 14), some_output(2, 30)
    held = {}
    for reset in ("rotate", "prefill"):
        method = method_of("carry-below-half", reset=reset)
        with kvcomp.patch(llama, method) as run:
            cache = run.new_cache()
            dictate(llama, run, batch, output, cache=cache)
        held[reset] = [(x.keys[1], x.values[1]) for x in cache.context.kv.layers]
    for position, pair in enumerate(zip(held["rotate"], held["prefill"], strict=True)):
        for rotated, encoded in zip(*pair, strict=True):
            assert torch.equal(rotated[:, : 14 + 3], encoded[:, : 14 + 3])
            apart = (rotated - encoded)[:, 14 + 3 :].norm() / encoded[:, 14 + 3 :].norm()
            assert apart < 1e-5 if position == 0 else apart > 0.05


def test_figures_counted_by_hand(llama):
    question, output = torch.randint(3, 128, (1, 20)), some_output(1, 36)
    batch = {"input_ids": question}
    token_bytes = 3 * 2 * 2 * 32 * 4  # layers; K and V, 2 heads of 32 floats
    for fields in ({}, {"reset": "streaming", "piece": 2}, {"reset": "rotate"}):
        method = Delethink(16, 10, max_chunks=None, head=3, **fields)
        with kvcomp.patch(llama, method) as run:
            dictate(llama, run, batch, output)
        report = run.report(layers=True)
        contexts = slow.chunks(method, question, slow.dictated(output), 36)
        attended = 0
        for number, (prompt, response) in enumerate(contexts):  # the first token is no step
            steps = range(1 if number == 0 else 0, response.shape[1])
            attended += sum(prompt.shape[1] + step for step in steps)
        assert report.tokens_decoded == 35
        assert report.tokens_attended == pytest.approx(attended / 35)
        assert all(x["tokens_attended"] == pytest.approx(attended / 35) for x in report.layers)
        assert report.tokens_attended_dense == pytest.approx(sum(range(21, 56)) / 35)
        assert report.kept_peak == 20 + 16 - 1  # a chunk's last token is the next context's
        last = contexts[-1][0].shape[1] + contexts[-1][1].shape[1] - 1
        assert report.kv_bytes_kept == last * token_bytes
        assert report.kv_bytes_dense == 55 * token_bytes
        boundaries = len(contexts) - 1
        assert report.boundaries == boundaries == 4
        reencoded = 0 if fields.get("reset") == "rotate" else boundaries * (7 - 1)
        assert report.tokens_reencoded == reencoded
        one = (20 + 16 - 1) * token_bytes
        if fields.get("reset") == "streaming":
            assert one < report.kv_bytes_peak <= one + (20 + 3 + 6) * token_bytes
        else:
            assert report.kv_bytes_peak == one


# --- how it ends ------------------------------------------------------------------------------


def test_where_generate_stops(llama):
    batch = ragged(9, 14)
    whole = slow_greedy(llama, Delethink(**SHORT), batch, 40)
    for max_chunks, tokens, expected in (
        (3, 100, 27),
        (3, 20, 20),
        (3, 13, 13),
        (3, 14, 14),
        (1, 100, 13),
        (None, 40, 40),
    ):
        method = Delethink(**SHORT | {"max_chunks": max_chunks})
        with kvcomp.patch(llama, method) as run:
            out = generate(llama, batch, tokens)
        assert torch.equal(out, whole[:, :expected]), (max_chunks, tokens)
        assert run.report().boundaries == max(0, -(-(expected - 13) // 7))
    with kvcomp.patch(llama, Delethink(**SHORT | {"max_chunks": 3})):
        for longest, expected in ((20, 6), (100, 27)):  # of prompt and output
            out = generate(llama, batch, None, max_length=longest)
            assert torch.equal(out, whole[:, :expected])


class EndsAt(LogitsProcessor):
    """Makes each row say EOS in its place, whatever the model thinks of it."""

    def __init__(self, prompt, places):
        self.prompt, self.places = prompt, places

    def __call__(self, input_ids, scores):
        for row, place in enumerate(self.places):
            if input_ids.shape[1] - self.prompt == place:
                scores[row, 2] = torch.inf
        return scores


@pytest.mark.parametrize("reset", ["prefill", "streaming"])
def test_rows_that_end_in_different_chunks(llama, reset):
    """Last and first token of a chunk, and in the middle of another; each row as it is alone."""
    batch, method = ragged(9, 14, 11, 7), Delethink(**SHORT, reset=reset, piece=2)
    respond = slow.stock(llama, do_sample=False, eos_token_id=2, suppress_tokens=[2])
    whole = torch.cat([slow.think(method, row, respond, 27) for row in questions(batch)])
    for places in ((12, 13, 26, 19), (13, 12, 5, 0), (12, 12, 12, 12)):
        with kvcomp.patch(llama, method) as run:
            out = generate(
                llama,
                batch,
                40,
                eos_token_id=2,
                suppress_tokens=[2],
                logits_processor=[EndsAt(14, places)],
            )
        assert out.shape[1] == max(places) + 1
        assert run.report().boundaries == max(0, -(-(max(places) - 12) // 7))
        for row, place in enumerate(places):
            assert torch.equal(out[row, :place], whole[row, :place])
            assert out[row, place] == 2
            assert not out[row, place + 1 :].any(), "padding follows"


# --- ways to generate -------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["prefill", "streaming"])
@pytest.mark.parametrize("rows", [1, 3])
def test_samples_are_those_of_one_generate_per_chunk(llama, reset, rows):
    question = ragged(11)
    method = Delethink(**SHORT, reset=reset, piece=2)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "eos_token_id": NEVER}
    torch.manual_seed(7)
    prompts = question["input_ids"].expand(rows, -1)
    want = slow.think(method, prompts, slow.stock(llama, **sampling), 40)
    torch.manual_seed(7)
    with kvcomp.patch(llama, method):
        got = generate(llama, question, 40, **sampling, num_return_sequences=rows)
    assert torch.equal(got, want)
    assert len(got.unique(dim=0)) == rows


def test_processors_and_criteria_see_the_whole_trace(llama):
    """A penalty on repetition is about all that was said, and not only what is in the context."""
    batch, method, seen = ragged(11), Delethink(**SHORT), []
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    trace = batch["input_ids"]

    def respond(prompt, limit):
        nonlocal trace
        said = prompt
        for _ in range(limit):
            with torch.no_grad():
                scores = penalty(trace, llama(said).logits[:, -1])
            said, trace = (torch.cat([x, scores.argmax(-1)[:, None]], 1) for x in (said, trace))
        return said[:, prompt.shape[1] :]

    want = slow.think(method, batch["input_ids"], respond, 40)

    def enough(input_ids, scores, **kwargs):
        seen.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] == 11 + 31)

    with kvcomp.patch(llama, method):
        got = generate(llama, batch, 40, repetition_penalty=1.5, stopping_criteria=[enough])
    assert torch.equal(got, want[:, :31])
    assert not torch.equal(got, slow_greedy(llama, method, batch, 31))
    assert [ids.shape[1] for ids in seen] == list(range(12, 43))
    assert torch.equal(seen[-1][:, 11:], got)


def test_a_streamer_gets_each_token_once(llama):
    class Recorder:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    batch, recorder = ragged(11), Recorder()
    with kvcomp.patch(llama, Delethink(**SHORT)):
        out = generate(llama, batch, 40, streamer=recorder)
    assert recorder.tokens == batch["input_ids"][0].tolist() + out[0].tolist()
    assert recorder.ended == 1


def test_a_dictionary_with_scores(llama):
    batch, method = ragged(9, 14), Delethink(**SHORT)
    with kvcomp.patch(llama, method) as run:
        out = llama.generate(
            **batch,
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=NEVER,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        cache = out.past_key_values
        assert cache.meter is run.meter and cache.get_seq_length() == 14 + 39
    output = out.sequences[:, 14:]
    want = slow_logits(method, batch, output, slow.plain(llama))
    assert_close(torch.stack(out.scores, 1), want)
    assert_close(torch.stack(out.logits, 1), want)


def test_positions_that_the_contexts_do_not_have_are_refused(llama):
    """The output's go on from the contexts' own, so others would leave a gap behind the prompt."""
    ids = torch.arange(3, 16)[None]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    own = torch.arange(13)[None]
    with kvcomp.patch(llama, Delethink(**SHORT)):
        plain = llama.generate(ids, eos_token_id=NEVER, **given)
        with pytest.raises(ValueError, match="delethink counts the positions"):
            llama.generate(ids, eos_token_id=NEVER, position_ids=own + 3, **given)
        same = llama.generate(ids, eos_token_id=NEVER, position_ids=own, **given)
    assert torch.equal(same, plain)
