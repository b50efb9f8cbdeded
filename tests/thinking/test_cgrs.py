"""Suppression of reflection by certainty: its rate, its probes, and what they leave alone."""

import math

import pytest
import torch

import kvcomp
from kvcomp import thinking
from kvcomp.testing.models import tiny_model
from kvcomp.thinking.cgrs import certainty
from thinking_steps import METHODS, decode, ids
from toy_words import WORDS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_certainty():
    uniform = torch.full((1, 3), math.log(128))
    uniform[0, 2] = float("nan")
    assert certainty(uniform, 128).item() == pytest.approx(0)
    assert certainty(torch.zeros(1, 2), 128).item() == 1


@pytest.fixture(scope="module")
def head():
    """A model whose next token never depends on what it read: `likely` tokens alike, else never."""

    def make(likely):
        made = tiny_model("llama", num_hidden_layers=1)
        made.lm_head = torch.nn.Linear(64, 128)
        made.lm_head.weight.data.zero_()
        made.lm_head.bias.data.fill_(-1e4).index_fill_(0, torch.tensor(likely), 0.0)
        return made

    return make


def test_the_rate_is_that_of_the_certainty(head, words):
    """Of 128 tokens 4 are likely: H = log 4, so C = 1 - log 4 / log 128."""
    made = head([30, 31, 32, 33])
    prompt = ids(8)
    prompt[:, -1] = WORDS.index("\n\n")
    with kvcomp.patch(made, kvcomp.Full()) as run:
        cgrs = thinking.Cgrs(run, words, delta=0.5, answer=4, seed=1)
        decode(made, prompt, cgrs, tokens=100)
    sure = 1 - math.log(4) / math.log(128)
    assert cgrs.certainties == pytest.approx([sure] * 8, abs=1e-5)
    rate, steps = (sure - 0.5) / 0.5, 800
    assert abs(cgrs.suppressed - rate * steps) < 3 * math.sqrt(steps * rate * (1 - rate))
    probe = len(cgrs.probe)
    assert (cgrs.probes, cgrs.trial_tokens) == (8, 8 * (probe + 3))


def test_a_certain_model_never_reflects_and_an_uncertain_one_may(head, words):
    prompt = ids()
    prompt[:, -1] = WORDS.index("\n\n")
    for likely, suppressed in (([WORDS.index("Hmm")], 30), (list(range(128)), 0)):
        made = head(likely)
        with kvcomp.patch(made, kvcomp.Full()) as run:
            cgrs = thinking.Cgrs(run, words)
            out = decode(made, prompt, cgrs, tokens=30, suppress_tokens=[WORDS.index("\n\n")])
        assert cgrs.suppressed == suppressed
        assert not suppressed or WORDS.index("Hmm") not in out


def test_lazy_probes_only_where_a_word_is_about_to_come(head, words):
    prompt = ids()
    prompt[:, -1] = WORDS.index("\n\n")
    for likely, probes in (([WORDS.index("Wait")], 1), ([40], 0)):
        made = head(likely)
        with kvcomp.patch(made, kvcomp.Full()) as run:
            cgrs = thinking.Cgrs(run, words, lazy=True)
            decode(made, prompt, cgrs, tokens=5)
        assert cgrs.probes == probes


def test_the_cache_of_another_run_is_not_probed(model, words):
    ends = ("w",)
    with kvcomp.patch(model, kvcomp.Full()) as run:
        kept = run.new_cache()
        model(ids(), past_key_values=kept)
        other = thinking.Cgrs(run, words, ends=ends)
    with kvcomp.patch(model, kvcomp.Full()) as run:
        with pytest.raises(ValueError, match="Cgrs: run: expected the run under which the model"):
            decode(model, ids(seed=9), other)
        decode(model, ids(seed=9), thinking.Cgrs(run, words, ends=ends, answer=1), tokens=4)


def test_beams_keep_the_certainty_of_their_own_text(head, words):
    """Rows that change places take their rates along; another text begins without any."""
    with kvcomp.patch(head([40]), kvcomp.Full()) as run:
        cgrs = thinking.Cgrs(run, words, rate=0.0)
        cgrs.rate = None  # so that nothing is probed here, as no paragraph ends
        one, two = torch.tensor([[40, 41], [40, 42]]), torch.zeros(2, 128)
        cgrs(one, two)
        cgrs._rates = [0.0, 1.0]
        found = cgrs(torch.tensor([[40, 42, 43], [40, 41, 43]]), two)
        assert found[0, WORDS.index("Wait")] < -1e30 and not found[1].any()
        assert not cgrs(torch.tensor([[50, 51, 52, 53], [40, 41, 43, 44]]), two).any()


@pytest.mark.parametrize("name", METHODS)
def test_probes_change_nothing_where_they_suppress_nothing(model, words, name):
    """A random model is never certain: its tokens are those without, though it was probed."""
    prompt = ids(3)
    with kvcomp.patch(model, METHODS[name]) as run:
        plain, report = decode(model, prompt, tokens=26), run.report()
    with kvcomp.patch(model, METHODS[name]) as run:
        ends = ("w",)  # of the text of most tokens
        cgrs = thinking.Cgrs(run, words, delta=0.999, answer=3, ends=ends)
        assert torch.equal(decode(model, prompt, cgrs, tokens=26), plain)
        assert run.report().tokens_decoded == report.tokens_decoded
        assert run.report().kv_bytes_read_per_token == report.kv_bytes_read_per_token
    assert cgrs.probes > 20
