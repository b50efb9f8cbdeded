"""Stand beside the processors of `kvcomp.thinking`: the tokens of decoding without it."""

import pytest
import torch

import kvcomp
from kvcomp import Delethink, Delta, Full, LazyEviction, LouisKV
from kvcomp.testing.models import tiny_model
from kvcomp.thinking import BudgetForcing, Cgrs, ConciseHint, GumbelNoise, Stand, StopScale
from toy_words import toy_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(30, 128, (2, 9), generator=torch.Generator().manual_seed(5)).repeat(1, 3)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
METHODS = {
    "full": Full(),
    "delta": Delta.example(32),
    "lazy": LazyEviction(budget=30, window=8, alpha=0.05),
    "louis": LouisKV.example(32),
    "delethink": Delethink(chunk=16, carry=8, head=2, max_chunks=None),
}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 12}
NEW = 48


@pytest.fixture(scope="module")
def llama():
    """One whose certainty varies."""
    return tiny_model("llama", tie_word_embeddings=True, initializer_range=0.3)


@pytest.fixture(scope="module")
def words():
    return toy_tokenizer()


def decode(model, method, make, rows=2, stand=None, **options):
    """Tokens, the processor, and the report."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 1000} | options
    own = {} if stand is None else {"custom_generate": stand}
    with kvcomp.patch(model, method) as run:
        made = make(run)
        out = model.generate(
            *(IDS[-rows:],),
            attention_mask=MASK[-rows:],
            logits_processor=[made, GumbelNoise(3)],
            **options,
            **own,
        )
    return out, made, run.report()


def both(model, method, make, **options):
    """The tokens are those without Stand, where drafts are wrong and where, as the table knows the
    text by then, most are right. Returns both processors."""
    plain, one, _ = decode(model, method, make, **options)
    stand = Stand(sure=0.0, seed=3, adapt=False)
    for _ in range(2):
        got, other, report = decode(model, method, make, stand=stand, **options)
        assert torch.equal(got, plain)
    assert report.tokens_accepted > NEW // 4
    return one, other


def probing(words, **more):
    """A paragraph ends with every third token. The words are many, so that a wrong rate shows."""
    ends = tuple(f"w{n}w" for n in range(0, 90, 3))
    said = tuple(f"w{n}w" for n in range(1, 90, 4))
    given = {"delta": 0.1, "answer": 3, "ends": ends, "words": said, "seed": 1} | more
    return lambda run: Cgrs(run, words, **given)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("rows", "sampling"), [(1, {}), (2, SAMPLED)], ids=["one", "two"])
def test_tentative_answers_are_those_without(llama, words, name, rows, sampling):
    one, other = both(llama, METHODS[name], probing(words), rows=rows, **sampling)
    assert 0 < one.suppressed < rows * NEW
    if rows == 1:  # of several, one that has come to its end may be drawn further
        assert other.probes == one.probes > 0 and other.suppressed == one.suppressed
        assert other.certainties == pytest.approx(one.certainties, abs=1e-5)


@pytest.mark.parametrize("more", [{"lazy": True}, {"rate": 0.5}], ids=["lazy", "rate"])
def test_lazy_and_fixed_rates(llama, words, more):
    one, other = both(llama, METHODS["lazy"], probing(words, **more), rows=1)
    assert other.probes == one.probes and other.suppressed == one.suppressed > 0


@pytest.mark.parametrize("name", ["full", "delta", "lazy"])
def test_functions_of_the_tokens_are_as_without(llama, words, name):
    columns = IDS.shape[1]
    end = {"end": "w70w"}
    for make in (
        lambda run: BudgetForcing(words, columns, budget=20, minimum=12, **end),
        lambda run: StopScale(words, columns, bias=3.0, minimum=5, **end),
        lambda run: ConciseHint(words, columns, hint="so so", alpha=8, ends=("w",)),
    ):
        for sampling in ({}, SAMPLED):
            both(llama, METHODS[name], make, **sampling)
