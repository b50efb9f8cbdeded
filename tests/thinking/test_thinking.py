"""Strategies that act while a model decodes: what they change, and that it is nothing else."""

import copy
import math

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessor

import kvcomp
from kvcomp import reasoner, thinking
from kvcomp.hf.trial import trial
from thinking_steps import METHODS, decode, ids
from toy_words import WORDS, toy_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
END, WAIT, EOS = WORDS.index("</think>"), WORDS.index("Wait"), WORDS.index("<eos>")


def state(cache):
    """All tensors of a cache and its counters, for comparison."""
    found = {"steps": cache.kv.steps, "columns": cache.columns}
    for layer in cache.kv.layers:
        place = layer.position
        found |= {f"{place} k": layer.keys.clone(), f"{place} v": layer.values.clone()}
        found |= {f"{place} {name}": each.clone() for name, each in layer.state.items()}
        found |= {f"{place} slot {name}": each.clone() for name, each in layer.slots.items()}
        found |= {f"{place} lens": layer.seq_lens.clone()}
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(
        torch.equal(a, other[name]) if isinstance(a, torch.Tensor) else a == other[name]
        for name, a in one.items()
    )


# --- trial ----------------------------------------------------------------------------------------


class Probing(LogitsProcessor):
    """Decodes something else beside every sequence in every step, and checks the cache."""

    def __init__(self, run):
        self.run, self.steps = run, 0

    def __call__(self, input_ids, scores):
        before, report = state(self.run.latest), copy.deepcopy(self.run.meter.__dict__)
        with trial(self.run, torch.tensor([len(input_ids) - 1])) as beside:
            beside.feed(torch.tensor([[40, 41, 42]]))
            beside.feed(torch.tensor([[43]]))
        assert same(before, state(self.run.latest))
        assert str(report) == str(self.run.meter.__dict__)
        self.steps += 1
        return scores


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_leaves_no_trace(model, name):
    prompt = ids(2)
    with kvcomp.patch(model, METHODS[name]) as run:
        plain = decode(model, prompt, tokens=26)
        probing = Probing(run)
        assert torch.equal(decode(model, prompt, probing, tokens=26), plain)
    assert probing.steps == 26


def test_a_trial_reads_what_a_fresh_prompt_would(model):
    prompt, more = ids(), ids(1, 5, seed=9)
    with kvcomp.patch(model, kvcomp.Full()) as run:
        cache = run.new_cache()
        model(prompt, past_key_values=cache)
        with trial(run, torch.tensor([0])) as beside:
            found = beside.feed(more)
        wanted = model(torch.cat([prompt, more], 1)).logits[:, -1]
    assert torch.allclose(found, wanted, atol=1e-5)


# --- stop control ---------------------------------------------------------------------------------


def lengths(tokens, token=END):
    """Where each row has the token for the first time; its length where it has not."""
    rows = tokens.tolist()
    return [row.index(token) if token in row else len(row) for row in rows]


def test_the_end_comes_earlier_the_larger_the_bias(model, words):
    prompt = ids(4)
    found = []
    for bias in (-50.0, 0.0, 5.0, 10.0, 50.0):
        scale = thinking.StopScale(words, prompt.shape[1], bias=bias)
        found.append(sum(lengths(decode(model, prompt, scale))))
    assert found == sorted(found, reverse=True)
    assert found[0] == 4 * 40 and found[-1] == 0


def test_a_scale_favours_the_end_whatever_its_sign(words):
    scores = torch.zeros(2, 128)
    scores[0, END], scores[1, END] = 2.0, -2.0
    scale = thinking.StopScale(words, 3, scale=4.0, minimum=2)
    shorter = torch.zeros(2, 4, dtype=torch.long)
    assert torch.equal(scale(shorter, scores), scores)
    longer = torch.zeros(2, 5, dtype=torch.long)
    assert scale(longer, scores)[:, END].tolist() == [8.0, -0.5]
    ended = longer.clone()
    ended[0, 3] = END
    assert scale(ended, scores)[:, END].tolist() == [2.0, -0.5]


@pytest.mark.parametrize("do_sample", [False, True])
def test_thoughts_end_within_their_budget(model, words, do_sample):
    prompt = ids(4)
    often = thinking.StopScale(words, prompt.shape[1], bias=6.0)
    forcing = thinking.BudgetForcing(words, prompt.shape[1], budget=20, minimum=7)
    torch.manual_seed(0)
    tokens = decode(model, prompt, often, forcing, do_sample=do_sample)
    for length in lengths(tokens):
        assert 7 <= length <= 20


def test_before_the_minimum_the_end_becomes_wait(words):
    scores = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    forcing = thinking.BudgetForcing(words, 3, minimum=9)
    before = scores.softmax(1)[0]
    after = forcing(torch.zeros(1, 4, dtype=torch.long), scores).softmax(1)[0]
    assert after[END] == after[EOS] == 0
    assert math.isclose(after[WAIT], before[[END, EOS, WAIT]].sum(), rel_tol=1e-5)
    others = [each for each in range(128) if each not in (END, EOS, WAIT)]
    assert torch.allclose(after[others], before[others], atol=1e-6)
    scores[0, END] = 50.0
    assert forcing(torch.zeros(1, 4, dtype=torch.long), scores).argmax() == WAIT


# --- hints ----------------------------------------------------------------------------------------


def test_hints_stand_behind_sentences_at_growing_distances(words):
    """A text of sentences of seven tokens, read by a processor that may put hints in."""
    hint = thinking.ConciseHint(words, 10, hint="{so}", alpha=16, beta=0.5, longest=40)
    size = len(hint.hint)
    full_stop = WORDS.index(".")
    row, plain = [50] * 10, 0
    while len(row) < 300:
        scores = hint(torch.tensor([row]), torch.zeros(1, 128))
        if torch.isinf(scores).any():
            row.append(int(scores.argmax()))
        else:
            plain += 1
            row.append(full_stop if plain % 7 == 0 else 60)
    starts = [i for i in range(10, 297) if row[i : i + size] == hint.hint]
    assert len(starts) >= 5
    last = 10
    for start in starts:
        assert row[start - 1] == full_stop
        assert 0 <= start - last - min(16 + last // 2, 40) < 7
        last = start + size


@pytest.mark.parametrize("name", ["full", "lazy", "delethink"])
def test_hints_under_generate(model, words, name):
    prompt = ids(2)
    hint = thinking.ConciseHint(words, 24, hint="{so}", alpha=8, beta=0.0, ends=("w",))
    with kvcomp.patch(model, METHODS[name]):
        texts = words.batch_decode(decode(model, prompt, hint))
    assert all("w{so}" in text for text in texts)


def rewound(model, words, prompt, most, hint, alpha, beta, longest, mark):
    """The slow way: every interval begins with a fresh prompt of the text with all hints in it."""
    size = prompt.shape[1] + most
    fresh = ids = prompt
    hints = 0
    while True:
        tau = int(min(alpha + beta * ids.shape[1], longest))
        begun, more = ids.shape[1], min(ids.shape[1] + tau, size) - fresh.shape[1]
        ids = torch.cat([fresh, decode(model, fresh, tokens=more)], 1)
        if ids.shape[1] == size:
            return ids[:, prompt.shape[1] :], hints
        texts = words.batch_decode([[token] for token in ids[0, begun:].tolist()])
        skipped = min((tau - alpha) / longest, 0.8) * len("".join(texts))
        for place in range(len(texts)):
            if len("".join(texts[:place])) + texts[place].find(mark) < int(skipped):
                continue
            if mark in texts[place] and ids.shape[1] + len(hint) < size:
                head, tail = ids[:, : begun + place + 1], ids[:, begun + place + 1 :]
                fresh = ids = torch.cat([head, torch.tensor([hint]), tail], 1)
                hints += 1
                break


@pytest.mark.parametrize("name", ["full", "delta"])
def test_hints_put_back_are_a_fresh_encoding_of_the_text(model, words, name):
    prompt, numbers = ids(), {"alpha": 8, "beta": 0.1, "longest": 40}
    with kvcomp.patch(model, METHODS[name]):
        hint = thinking.ConciseHint(words, 24, place="rewind", hint="{so}", ends=("3w",), **numbers)
        wanted, hints = rewound(model, words, prompt, 90, hint.hint, mark="3w", **numbers)
        assert torch.equal(decode(model, prompt, tokens=90, custom_generate=hint), wanted)
        kept = decode(model, prompt, tokens=90, custom_generate=hint)  # nothing is left over
    assert torch.equal(kept, wanted) and hints > 2


def test_a_hint_put_back_stands_where_the_published_rule_has_it(words):
    """Before the blank behind a mark; later intervals are searched from a later share on."""
    hint = thinking.ConciseHint(words, 0, place="rewind", hint="{so}", alpha=128)
    text = words.encode("a. b. c.d", add_special_tokens=False)
    assert hint._place(text, 128) == 2
    assert hint._place(text, 128 + 512) == 5  # from half of 9 characters on
    assert hint._place(text, 128 + 1024) is None  # from 80%
    assert hint._place(words.encode("a.b", add_special_tokens=False), 128) is None


@pytest.mark.parametrize("name", ["lazy", "louis", "delethink"])
def test_hints_are_not_put_back_where_tokens_cannot_be(model, words, name):
    hint = thinking.ConciseHint(words, 24, place="rewind", hint="{so}")
    with kvcomp.patch(model, METHODS[name]) as run:
        with pytest.raises(ValueError, match="ConciseHint: place='rewind': expected a m") as error:
            decode(model, ids(), custom_generate=hint)
        assert run.report().tokens_decoded == 0
    assert "\n" not in str(error.value)


def test_processors_and_loops_in_each_others_place_are_named(model, words):
    end = thinking.ConciseHint(words, 24, hint="{so}")
    rewind = thinking.ConciseHint(words, 24, place="rewind", hint="{so}")
    with kvcomp.patch(model, METHODS["full"]) as run:
        for processor in (end, thinking.GumbelNoise()):
            with pytest.raises(ValueError, match="kvcomp: generate: custom_generate: expected a"):
                decode(model, ids(), custom_generate=processor)
        for loop in (rewind, thinking.Stand()):
            with pytest.raises(ValueError, match="kvcomp: generate: logits_processor: expected f"):
                decode(model, ids(), loop)
        assert run.report().tokens_decoded == 0


# --- bad input ------------------------------------------------------------------------------------


def reasoner_words():
    """A tokenizer that knows the words of a walk and no others."""
    return AutoTokenizer.from_pretrained(reasoner.path())


BAD = [
    (lambda w, run: thinking.StopScale(w, -1), "StopScale: prompt"),
    (lambda w, run: thinking.StopScale(w, 3, scale=0), "StopScale: scale"),
    (lambda w, run: thinking.StopScale(w, 3, bias=float("nan")), "StopScale: bias"),
    (lambda w, run: thinking.StopScale(toy_tokenizer(think=False), 3), "marks its thoughts"),
    (lambda w, run: thinking.StopScale(w, 3, end="Wait so"), "one token"),
    (lambda w, run: thinking.BudgetForcing(w, 3, budget=-5), "BudgetForcing: budget"),
    (lambda w, run: thinking.BudgetForcing(w, 3, budget=5, minimum=6), "at most budget=5"),
    (lambda w, run: thinking.BudgetForcing(w, 3, minimum=6, wait="Wait so"), "wait"),
    (lambda w, run: thinking.BudgetForcing(w, 3), "a budget or a minimum"),
    (lambda w, run: thinking.ConciseHint(w, 3, hint=" "), "ConciseHint: hint"),
    (lambda w, run: thinking.ConciseHint(reasoner_words(), 3), "ConciseHint: hint: expected a"),
    (lambda w, run: thinking.ConciseHint(w, 3, ends=(".", "")), "ConciseHint: ends"),
    (lambda w, run: thinking.ConciseHint(w, 3, ends="."), "ConciseHint: ends"),
    (lambda w, run: thinking.ConciseHint(w, 3, place="back"), "ConciseHint: place"),
    (lambda w, run: thinking.ConciseHint(w, 3, alpha=20, longest=10), "at least alpha=20"),
    (lambda w, run: thinking.Cgrs(None, w), "Cgrs: run"),
    (lambda w, run: thinking.Cgrs(run, w, delta=1.0), "Cgrs: delta"),
    (lambda w, run: thinking.Cgrs(run, w, rate=1.5), "Cgrs: rate"),
    (lambda w, run: thinking.Cgrs(run, w, words=("perchance",)), "words"),
    (lambda w, run: thinking.Cgrs(run, w, words="Wait"), "Cgrs: words: expected a tuple"),
    (lambda w, run: thinking.Cgrs(run, w, ends=("",)), "Cgrs: ends"),
    (lambda w, run: thinking.Cgrs(run, w, close=""), "Cgrs: close"),
    (lambda w, run: thinking.Cgrs(run, w, probe=""), "Cgrs: probe"),
]


@pytest.mark.parametrize(("make", "match"), BAD)
def test_bad_input(model, words, make, match):
    with kvcomp.patch(model, kvcomp.Full()) as run, pytest.raises(ValueError) as error:
        make(words, run)
    text = str(error.value)
    assert text.startswith("kvcomp.thinking: ") and match in text and "\n" not in text
    assert model.config._attn_implementation != "kvcomp"


def test_a_prompt_that_is_longer_than_what_is_decoded(model, words):
    with pytest.raises(ValueError, match="StopScale: prompt: expected"):
        decode(model, ids(), thinking.StopScale(words, 100))
