"""Stand: the tokens of decoding one by one, in fewer forwards; and draws that are the seed's."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV, cli
from kvcomp.reasoner import task
from kvcomp.testing.models import tiny_model
from kvcomp.thinking import GumbelNoise, Stand
from kvcomp.thinking.drafts import Draft, Trust
from kvcomp.thinking.ngrams import Entry, NgramTable
from kvcomp.thinking.noise import gumbel
from kvcomp.thinking.nucleus import Nucleus

pytestmark = pytest.mark.usefixtures("one_thread")

PADDED = 4
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5)).repeat(1, 3)
MASK = torch.ones_like(IDS)
MASK[0, :PADDED] = 0
CHUNKS = {"chunk": 16, "carry": 8, "head": 2, "max_chunks": None}
METHODS_ = {
    "full": Full(),
    "delta": Delta.example(32),
    "lazy-eviction": LazyEviction(budget=30, window=8, alpha=0.05),
    "louis-kv": LouisKV.example(32),
    "delethink": Delethink(**CHUNKS),
    "delethink-lazy": Delethink(**CHUNKS | {"chunk": 40}, inner=LazyEviction(30, 8, alpha=0.05)),
}


@pytest.fixture(scope="module")
def llama():
    """One that repeats itself, as a thought does."""
    return tiny_model("llama", tie_word_embeddings=True, initializer_range=0.12)


def generate(model, ids=IDS, mask=MASK, **options):
    options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": 1000} | options
    return model.generate(ids, attention_mask=mask, **options)


def both(model, method, noise=None, **options):
    """Tokens without and with Stand, and the report of the latter."""
    with kvcomp.patch(model, method):
        drawn = {} if noise is None else {"logits_processor": LogitsProcessorList([noise])}
        plain = generate(model, **drawn, **options)
    seed = 0 if noise is None else noise.seed
    stand = Stand(sure=0.0, seed=seed, adapt=False)
    with kvcomp.patch(model, method) as run:
        got = generate(model, custom_generate=stand, **options)
        return plain, got, run.report()


@pytest.mark.parametrize("name", METHODS_)
def test_greedy_tokens_are_those_without(llama, name):
    plain, got, report = both(llama, METHODS_[name])
    assert torch.equal(got, plain)
    assert report.tokens_accepted
    assert report.tokens_drafted > report.tokens_accepted


@pytest.mark.parametrize("name", METHODS_)
def test_sampled_tokens_are_the_seeds(llama, name):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 12}
    runs = [both(llama, METHODS_[name], GumbelNoise(seed), **options) for seed in (3, 4)]
    for plain, got, report in runs:
        assert torch.equal(got, plain)
        assert report.tokens_accepted
    assert not torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "gpt_oss"])
def test_other_models(kind):
    """Beside sliding layers all rows go together; learned sinks go through the drafts' softmax."""
    plain, got, report = both(tiny_model(kind), METHODS_["lazy-eviction"])
    assert torch.equal(got, plain) and report.verifications


@pytest.mark.parametrize("together", [False, True])
def test_forwards_of_many_rows_stay_within_those_that_give_the_same_bits(llama, together):
    """On a CPU 32 rows times tokens do, in 16 bits: eight rows have 24 drafts between them."""
    ids, sizes = IDS[1:].repeat(8, 1), []
    hook = (
        llama.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape[:2].numel()))
    )
    stand = Stand(sure=0.0, seed=5, adapt=False, together=together)
    with hook, kvcomp.patch(llama, Full()) as run:
        generate(llama, ids, None, custom_generate=stand, do_sample=True, temperature=0.7)
        accepted = run.report().tokens_accepted
    assert accepted and 24 < max(sizes[1:]) <= 32


def test_rows_end_where_they_end_without(llama):
    """At a token, at the length and at a criterion of the user's; pads behind."""
    with kvcomp.patch(llama, Full()):
        plain = generate(llama)
    ends = int(plain[0, IDS.shape[1] + 13])
    for method in (Full(), METHODS_["lazy-eviction"]):
        for options in ({"eos_token_id": ends}, {"max_new_tokens": 17}):
            plain, got, _ = both(llama, method, **options)
            assert torch.equal(got, plain)


def test_processors_and_criteria_know_a_row_by_its_number(llama):
    """Left padding counts per row in the penalty, and rows have words and ends of their own."""

    def allowed(row, ids):
        return range(3, 40) if row == 0 else range(60, 100)

    def ended(ids, scores):
        return torch.tensor([ids.shape[1] > most for most in (IDS.shape[1] + 9, 900)[: len(ids)]])

    for options in (
        {"repetition_penalty": 1.3},
        {"prefix_allowed_tokens_fn": allowed},
        {"stopping_criteria": [ended]},
    ):
        plain, got, _ = both(llama, Full(), **options)
        assert torch.equal(got, plain), options


def test_assisted_decoding_draws_the_same(llama):
    """Stock prompt lookup, sampled: the tokens of the seed too."""
    ids = IDS[1:]
    options = {"do_sample": True, "temperature": 0.7, "top_k": 12, "mask": None, "ids": ids}
    with kvcomp.patch(llama, METHODS_["lazy-eviction"]):
        plain, assisted = (
            generate(llama, logits_processor=LogitsProcessorList([GumbelNoise(5)]), **options, **x)
            for x in ({}, {"prompt_lookup_num_tokens": 4})
        )
    assert torch.equal(plain, assisted)


def test_the_output_and_the_cache_are_generates(llama):
    with kvcomp.patch(llama, Full()):
        out = generate(llama, custom_generate=Stand(), return_dict_in_generate=True)
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
        more = torch.cat([out.sequences, IDS[:, :5]], 1)
        mask = torch.nn.functional.pad(MASK, (0, more.shape[1] - MASK.shape[1]), value=1)
        again = generate(llama, more, mask, past_key_values=out.past_key_values)
        assert torch.equal(again, generate(llama, more, mask))


def test_draws_have_the_distribution_of_a_softmax():
    """Chi-square of 1e5 draws, of successive pairs of draws, and with a top-k."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, generator=generator) * 2
    for warp, kept in (({}, 50), ({"top_k": 7}, 7)):
        row = TopKLogitsWarper(**warp)(None, scores[None])[0] if warp else scores
        many, noise = 100_000, GumbelNoise(11)
        drawn = torch.cat(
            [
                noise.draw(row.expand(1000, -1), torch.arange(1000), position)
                for position in range(many // 1000)
            ]
        )
        want = row.double().softmax(-1) * many
        assert p_value(drawn.bincount(minlength=50), want) > 1e-3
        assert int((want > 0).sum()) == kept
        first, second = drawn[:-1000], drawn[1000:]  # one row, a position later
        few = row.argsort(descending=True)[:4]
        place = torch.full((50,), 4).scatter_(0, few, torch.arange(4))
        pairs = (place[first] * 5 + place[second]).bincount(minlength=25)
        share = torch.zeros(5, dtype=torch.float64).scatter_add_(0, place, want / many)
        assert p_value(pairs, torch.outer(share, share).flatten() * len(first)) > 1e-3


def p_value(counts, want):
    """Of Pearson's chi-square, by Wilson and Hilferty; bins of fewer than 5 together."""
    rare = want < 5
    counts, want = (torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (counts, want))
    counts, want = counts[want > 0], want[want > 0]
    chi2, free = float(((counts - want) ** 2 / want).sum()), len(want) - 1
    z = ((chi2 / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_noise_is_a_function_of_seed_row_position_and_token():
    tokens = torch.arange(1000)
    rows = torch.zeros_like(tokens)
    base = gumbel(1, rows, 7, tokens)
    assert torch.equal(base[5:], gumbel(1, rows[5:], 7, tokens[5:]))
    for other in (
        gumbel(2, rows, 7, tokens),
        gumbel(1, rows + 1, 7, tokens),
        gumbel(1, rows, 8, tokens),
    ):
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.1
    assert abs(float(base.mean()) - 0.5772) < 0.15


def test_a_table_averages_what_it_has_seen():
    table = NgramTable((3, 2), 2)
    table.learn([1, 2, 3], [7, 8], [0.6, 0.4])
    tokens, probs = table.find([9, 1, 2, 3])[:2]
    assert tokens.tolist() == [7, 8]
    table.learn([1, 2, 3], [9, 8], [0.9, 0.1])
    tokens, probs = table.find([1, 2, 3])[:2]
    assert tokens.tolist() == [9, 7] and probs.tolist() == pytest.approx([0.45, 0.3])
    assert table.find([5, 2, 3])[0].tolist() == [9, 7]
    assert table.find([2, 1]) is None and table.find([3]) is None
    for number in range(300):
        table.learn([number, number + 1], [1, 2], [0.5, 0.5])
    assert len(table) == 301 and table.find([250, 251])[0].tolist() == [1, 2]


def test_a_text_is_read_when_something_is_looked_up():
    """As if each token of it had been learnt as sure, from the given place on."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, 4, (300,), generator=generator).tolist()
    read, learnt = (NgramTable((3, 2, 1), 4) for _ in range(2))
    read.read(text[:200])
    assert not len(read)
    read.read(text, 200)
    for place in range(1, len(text)):
        sure = [text[place], -1, -2, -3], [1.0, 0.0, 0.0, 0.0]
        learnt.learn(text[max(place - 3, 0) : place], *sure, said=False)
    for place in range(3, len(text)):
        entry, other = (table.find(text[:place]) for table in (read, learnt))
        assert entry.probs == pytest.approx(other.probs, abs=1e-5) and entry.order == other.order
        assert entry.tokens[0] == other.tokens[0] or entry.probs[0] == pytest.approx(entry.probs[1])
        assert not entry.said
    assert len(read) == len(learnt)


def test_trust_is_the_share_that_was_right():
    """By kind, and from the table's probability where nothing was checked."""
    trust = Trust()
    entry = Entry(np.array([5, 6]), np.array([0.9, 0.1]), 3, True)
    kind = trust.kind(entry)
    before = trust.chance(kind)
    assert before == pytest.approx(0.9, abs=0.05)
    draft = Draft([5], [before], [kind])
    for token in [5, 7] * 50:
        assert trust.note(draft, 0, token) == (1 if token == 5 else None)
    assert trust.chance(kind) == pytest.approx(0.5, abs=0.03)
    assert trust.chance(trust.kind(entry._replace(order=2))) == before


def test_bad_input(llama):
    for given, match in (
        ({"orders": ()}, "orders: expected lengths"),
        ({"orders": (4, 0)}, "orders: expected lengths"),
        ({"top": 0}, "top: expected at least 1"),
        ({"depth": -1}, "depth: expected at least 1"),
        ({"sure": 1.5}, "sure: expected a probability"),
        ({"sure": float("nan")}, "sure: expected a probability"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"adapt": 1}, "adapt: expected True or False"),
        ({"together": 1}, "together: expected True, False or None"),
    ):
        with pytest.raises(ValueError, match=match):
            Stand(**given)
    with pytest.raises(ValueError, match=r"a model under kvcomp\.patch"):
        generate(llama, custom_generate=Stand())
    with kvcomp.patch(llama, Full()) as run:
        with pytest.raises(ValueError, match="which remembers each step"):
            generate(llama, custom_generate=Stand(), guidance_scale=1.5)
        assert not run.report().tokens_decoded
    h2o = METHODS["h2o"](budget=32, window=1)
    for method, options, match in (
        (h2o, {}, "h2o cannot check several tokens at once: it evicts at every step"),
        (Full(), {"num_beams": 2}, "num_beams: expected 1"),
        *(
            (Full(), {name: True, "return_dict_in_generate": True}, name)
            for name in ("output_scores", "output_logits", "output_hidden_states")
        ),
    ):
        with kvcomp.patch(llama, method) as run:
            with pytest.raises(ValueError, match=match):
                generate(llama, custom_generate=Stand(), **options)
            assert not run.report().tokens_decoded
    static, error = kvcomp.patch(llama, Full(), max_tokens=90), "without max_tokens"
    with static, pytest.raises(ValueError, match=error):
        generate(llama, custom_generate=Stand())


@pytest.mark.parametrize("sampling", [["--temperature", "0"], ["--temperature", "1.5"]])
def test_the_command_streams_the_tokens_of_the_run_without(capsys, sampling):
    question = task.make_problem(6, seed=3).prompt
    command = ["generate", "reasoner", "--prompt", question, "--max-new-tokens", "60", *sampling]
    assert cli.main([*command, "--method", "lazy-eviction", "--seed", "5"]) == 0
    plain = capsys.readouterr()
    assert (
        cli.main([*command, "--method", "lazy-eviction", "--seed", "5", "--strategy", "stand"]) == 0
    )
    got = capsys.readouterr()
    assert got.out == plain.out and "drafts" not in plain.err
    assert "accepted, in" in got.err
    assert cli.main([*command, "--strategy", "stand", "--with", "stand.depth=0"]) == 2
    assert "Stand: depth: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 1, 12, 50])
def test_a_nucleus_is_drawn_from_without_sorting(dtype, top_k):
    """Each sure draw is the one behind transformers' warpers: sharp and flat rows, with ties."""
    generator = torch.Generator().manual_seed(1)
    width = torch.linspace(0.2, 6, 60)[:, None]
    logits = (torch.randn(60, 500, generator=generator) * width).to(dtype)
    rows, noise, counted = torch.arange(60), GumbelNoise(3), 0
    cases = [(0.6, 0.3), (1.3, 0.8), (1.0, 0.95)] + ([(0.7, None)] if top_k else [])
    for temperature, top_p in cases:
        warpers = [TemperatureLogitsWarper(temperature)]
        warpers += [] if top_k is None else [TopKLogitsWarper(top_k)]
        warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]
        nucleus = Nucleus.of(warpers)
        assert nucleus == (temperature, top_k, top_p)
        scores = logits.float()
        for each in warpers:
            scores = each(None, scores)
        for place in range(10):
            places = torch.full((60,), place)
            tokens, sure, ids, probs = nucleus.draw(logits, noise.seed, rows, places)
            want = noise.draw(scores, rows, place)
            assert torch.equal(tokens[sure], want[sure])
            counted += int(sure.sum())
        exact = scores.softmax(1).gather(1, ids)[sure]
        assert float((exact - probs[sure]).abs().amax()) < 1e-2 or top_p is not None
    share = counted / (600 * len(cases))
    assert 0.4 < share < 0.99 if top_k is None else share > 0.8


def test_other_warpers_have_no_nucleus():
    """Those that keep too many tokens to look at, stand in another order, or are others."""
    warm, top_k, top_p = TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9)
    for warpers in (
        [],
        [warm],
        [TopKLogitsWarper(64)],
        [top_p, top_k],
        [top_k, top_k],
        [warm, MinPLogitsWarper(0.1)],
        [TopPLogitsWarper(0.9, min_tokens_to_keep=2)],
    ):
        assert Nucleus.of(warpers) is None
