"""Drivers of rows: those that leave, votes, leaders, ends; against slow or scripted ways."""

import itertools

import pytest
import torch

import kvcomp
from kvcomp import thinking
from kvcomp.testing.models import tiny_model
from kvcomp.thinking import Rows, Sampling
from thinking_rows import METHODS, WARM, prompt
from toy_words import WORDS, toy_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
END = WORDS.index("</think>")


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_notice_which_others_leave(model, name):
    """Four forks of a prompt; two leave in the middle, one more later, and so do their bytes."""
    sampling = Sampling(**WARM, seed=5, max_new_tokens=30)
    with kvcomp.patch(model, METHODS[name]) as run:
        whole = Rows(run, prompt(), sampling, copies=4, eos=[])
        whole.finish()
        rows = Rows(run, prompt(), sampling, copies=4, eos=[])
        for step in range(30):
            if step == 11:
                before = held(rows.cache)
                rows.keep([rows.all[1], rows.all[3]])
                assert held(rows.cache) == before // 2
            if step == 20:
                rows.keep([rows.all[3]])
            rows.step()
    assert [len(row.ids) for row in rows.all] == [11, 20, 11, 30]
    for row, other in zip(rows.all, whole.all, strict=True):
        assert row.ids == other.ids[: len(row.ids)]
    assert len({tuple(row.ids) for row in whole.all}) == 4


def held(cache):
    context = getattr(cache, "context", cache)
    return sum(layer.keys.untyped_storage().nbytes() for layer in context.kv.layers)


@pytest.mark.parametrize("name", ["full", "lazy", "delethink"])
def test_greedy_rows_are_those_of_generate(model, name):
    given = {"do_sample": False, "eos_token_id": 1000, "max_new_tokens": 30}
    batch = {"input_ids": prompt(14)["input_ids"].repeat(2, 1), "attention_mask": torch.ones(2, 14)}
    batch["attention_mask"] = batch["attention_mask"].long()
    batch["attention_mask"][0, :5] = 0
    with kvcomp.patch(model, METHODS[name]) as run:
        wanted = model.generate(**batch, **given)[:, 14:]
        rows = Rows(run, batch, Sampling(temperature=0, max_new_tokens=30), eos=[])
        rows.finish()
    assert [row.ids for row in rows.all] == wanted.tolist()
    assert rows.steps == 29


def test_rows_of_a_model_with_states_are_forked():
    """Layers of transformers that hold states have no way of their own to repeat them."""
    hybrid, ids = tiny_model("qwen3_next"), torch.arange(40, 60)[None]
    with kvcomp.patch(hybrid, kvcomp.Full()) as run:
        stock = hybrid.generate(ids, max_new_tokens=8, do_sample=False)
        rows = Rows(run, {"input_ids": ids}, Sampling(temperature=0, max_new_tokens=8), copies=3)
        rows.step()
        rows.keep(rows.live[1:])
        rows.finish()
    for row in rows.all[1:]:
        assert row.ids == stock[0, 20:].tolist()


def test_draws_have_the_right_distribution(model):
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=2, max_new_tokens=1)
    with kvcomp.patch(model, kvcomp.Full()) as run:
        rows = Rows(run, prompt(), sampling, copies=4000, eos=[])
        shares = rows.warpers(rows._ids, rows._logits)[0].softmax(0)
        rows.step()
    counts = torch.bincount(torch.tensor([row.ids[0] for row in rows.all]), minlength=128)
    assert counts[shares == 0].sum() == 0
    common = shares * 4000 > 5
    expected = shares[common] * 4000
    chi2 = ((counts[common] - expected) ** 2 / expected).sum().item()
    freedom = int(common.sum()) - 1
    assert chi2 < freedom + 3.1 * (2 * freedom) ** 0.5 + 5


def test_rows_that_say_eos_leave(model):
    with kvcomp.patch(model, kvcomp.Full()) as run:
        free = Rows(run, prompt(), Sampling(**WARM, max_new_tokens=20), copies=6, eos=[])
        free.finish()
        stop = free.all[2].ids[7]
        rows = Rows(run, prompt(), Sampling(**WARM, max_new_tokens=20), copies=6, eos=[stop])
        rows.finish()
    for row, other in zip(rows.all, free.all, strict=True):
        at = other.ids.index(stop) + 1 if stop in other.ids else 20
        assert row.ids == other.ids[:at] and row.ended == (stop in other.ids)
    assert rows.all[2].ended


# --- short-m@k ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lazy", "delethink"])
def test_short_m_stops_with_the_mth_shortest(model, words, name):
    given = {"answer_of": lambda text: str(len(text)), "max_new_tokens": 60, "seed": 1, **WARM}
    often = [thinking.StopScale(words, 20, bias=4.0)]
    with kvcomp.patch(model, METHODS[name]) as run:
        eos = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = WORDS.index("b")
        try:
            every = thinking.short_m_at_k(run, words, prompt(), k=6, m=6, processors=often, **given)
            few = thinking.short_m_at_k(run, words, prompt(), k=6, m=2, processors=often, **given)
        finally:
            model.generation_config.eos_token_id = eos
    assert few.lengths == sorted(every.lengths)[:2] and len(every.lengths) >= 3
    assert few.total_tokens < every.total_tokens and few.rows == 6
    assert few.answer == str(len(few.text))
    assert sum(few.votes.values()) == 2


def test_short_m_takes_as_many_steps_as_the_mth_shortest_thought(model, words):
    given = {"end": "b", "max_new_tokens": 60, "seed": 1, **WARM}
    eos = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = WORDS.index("b")  # so the end of a thought is all
    try:
        with kvcomp.patch(model, kvcomp.Full()) as run:
            every = thinking.majority(run, words, prompt(), k=6, max_new_tokens=60, seed=1, **WARM)
            for m in range(1, every.finished + 1):
                few = thinking.short_m_at_k(run, words, prompt(), k=6, m=m, **given)
                assert few.steps == sorted(every.lengths)[m - 1] - 1
    finally:
        model.generation_config.eos_token_id = eos
    assert every.finished >= 2


@pytest.mark.parametrize("name", ["full", "lazy"])
def test_the_shortest_thoughts_and_their_vote_are_the_same_under_stand(model, words, name):
    """Rows of one prompt that accept drafts of their own number: "first" counts tokens, so who wins
    does not depend on whose drafts were right."""
    ids, m = prompt()["input_ids"].repeat(8, 1), 3
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": True}
    given |= {"temperature": 0.8, "top_k": 8, "eos_token_id": WORDS.index("b"), "pad_token_id": 0}
    given["logits_processor"] = [thinking.StopScale(words, 20, bias=3.0, end="b")]

    def best(out):
        ended = [row.index(WORDS.index("b")) for row in out if WORDS.index("b") in row]
        texts = [words.decode(row) for row in out if WORDS.index("b") in row]
        order = sorted(range(len(ended)), key=lambda row: ended[row])[:m]
        answers = [str(len(texts[row]) % 3) for row in order]
        return [ended[row] for row in order], thinking.vote(answers, [ended[row] for row in order])

    with kvcomp.patch(model, METHODS[name]) as run:
        noise = thinking.GumbelNoise(4)
        processors = [*given.pop("logits_processor"), noise]
        plain = model.generate(ids, logits_processor=processors, **given)[:, 20:].tolist()
        stand = thinking.Stand(sure=0.0, seed=4, adapt=False)
        for _ in range(2):  # by the second time the table knows the text
            again = model.generate(
                ids, logits_processor=processors[:1], custom_generate=stand, **given
            )
        assert run.report().tokens_accepted
    assert best(again[:, 20:].tolist()) == best(plain) and len(best(plain)[0]) == m


def test_no_thought_that_was_cut_off_has_a_vote(model, words):
    never = [thinking.StopScale(words, 20, bias=-100.0)]
    with kvcomp.patch(model, kvcomp.Full()) as run:
        found = thinking.short_m_at_k(
            run, words, prompt(), k=3, m=1, processors=never, max_new_tokens=10, **WARM
        )
    assert (found.finished, found.answer, found.votes, found.text) == (0, None, {}, "")
    assert found.total_tokens == 20 + 3 * 10 and found.steps == 9


def test_votes():
    assert thinking.vote(["a", "b", "a"], [9, 1, 8]) == (2, {"a": 2, "b": 1})
    assert thinking.vote(["a", "b", None], [9, 3, 1]) == (1, {"a": 1, "b": 1})
    assert thinking.vote([None, None], [9, 3]) == (1, {})
    assert thinking.boxed(r"\boxed{1} then \boxed{ \frac{1}{2} }.") == r"\frac{1}{2}"
    assert thinking.boxed(r"\boxed{1") is None and thinking.boxed("1") is None


# --- a leader and a drafter -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter():
    return tiny_model("qwen3", seed=1, num_hidden_layers=2)


@pytest.mark.parametrize("name", ["full", "lazy", "louis"])
def test_at_its_ends_one_model_writes_alone(model, drafter, words, name):
    given = {"ends": ("w",), "temperature": 0, "max_new_tokens": 30}
    with kvcomp.patch(model, METHODS[name]) as led, kvcomp.patch(drafter, kvcomp.Full()) as drafts:
        for options, alone in (
            ({"lead": 10**6}, led),
            ({"gate": 0.0}, drafts),
            ({"lead": 0}, drafts),
        ):
            rows = Rows(alone, prompt(), Sampling(temperature=0, max_new_tokens=30), eos=[])
            rows.finish()
            found = thinking.follow_leader(led, drafts, words, prompt(), **options, **given)
            assert found.ids == rows.all[0].ids and found.handovers == 0
            assert found.led == (30 if alone is led else 0)


def test_a_leader_writes_the_first_tokens_of_each_sentence(model, drafter, words):
    """Against a slow loop that encodes everything anew for every token."""
    with kvcomp.patch(model, kvcomp.Full()) as led, kvcomp.patch(drafter, kvcomp.Full()) as drafts:
        found = thinking.follow_leader(
            led,
            drafts,
            words,
            prompt(),
            lead=2,
            ends=("3w", "7w"),
            temperature=0,
            max_new_tokens=40,
        )
    ids, place, led_tokens, turns = prompt()["input_ids"], 0, 0, []
    for _ in range(40):
        turn = place < 2
        with torch.no_grad():
            token = (model if turn else drafter)(ids).logits[:, -1].argmax(1, keepdim=True)
        ids, led_tokens = torch.cat([ids, token], 1), led_tokens + turn
        turns.append(turn)
        place = 0 if words.decode(ids[0, -4:]).endswith(("3w", "7w")) else place + 1
    assert found.ids == ids[0, 20:].tolist() and found.led == led_tokens
    assert found.handovers == sum(a != b for a, b in itertools.pairwise(turns)) > 2


# --- positions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_model():
    return tiny_model("llama", num_hidden_layers=3, max_position_embeddings=32)


@pytest.mark.parametrize("name", ["full", "lazy"])
def test_rows_stop_at_the_last_position_of_the_model(short_model, model, words, name):
    with kvcomp.patch(short_model, METHODS[name]) as run:
        rows = Rows(run, prompt(), Sampling(max_new_tokens=40), eos=[])
        rows.finish()
        assert len(rows.all[0].ids) == 32 - 20 and not rows.all[0].ended
        most = {"temperature": 0, "max_new_tokens": 40}
        for strategy in ("stand", "majority"):
            chosen = thinking.Chosen([strategy])
            more = {"chat": False, "answer_of": lambda text: None}
            found = chosen.drive(run, words, prompt(), None, **more, **most)
            assert max(found.lengths or [found.total_tokens]) <= 32
        with kvcomp.patch(model, kvcomp.Full()) as other:
            found = thinking.follow_leader(other, run, words, prompt(), **most)
            assert len(found.ids) == 12


def test_a_prompt_that_takes_all_positions_is_refused(short_model, model, words, tmp_path):
    most, log = Sampling(max_new_tokens=4), tmp_path / "log.jsonl"
    many = [{"id": "short", "ids": [40, 41]}, {"id": "long", "ids": [40] * 32}]
    expected = "expected fewer tokens than the 32 positions that the model knows, got 32"
    with kvcomp.patch(short_model, kvcomp.Full()) as run:
        with pytest.raises(ValueError, match=rf"^kvcomp.thinking: inputs: {expected}"):
            Rows(run, prompt(count=32), most)
        with pytest.raises(ValueError, match=rf"^kvcomp.thinking: problem 'long': {expected}"):
            thinking.think(run, words, many, thinking.Chosen([]), log=log)
        with pytest.raises(
            ValueError, match="at: expected fewer than the 12 tokens of a row, got 20"
        ):
            thinking.latent_trajectory(run, words, prompt(), at=20, block=4)
        with (
            kvcomp.patch(model, kvcomp.Full()) as other,
            pytest.raises(ValueError, match=rf"inputs of the drafter: {expected}"),
        ):
            thinking.follow_leader(other, run, words, prompt(count=32))
        assert run.report().tokens_decoded == 0 and not log.exists()


# --- bad input ------------------------------------------------------------------------------------


def short(run, words, **more):
    return thinking.short_m_at_k(run, words, prompt(), **more)


def latent(run, words, **more):
    return thinking.latent_trajectory(run, words, prompt(), **more)


BAD = [
    (lambda w, run: short(run, w, k=2, m=3), "short_m_at_k: m: expected in 1..k=2, got 3"),
    (lambda w, run: short(run, w, k=0), "short_m_at_k: k"),
    (lambda w, run: short(run, w, max_new_tokens=-1), "max_new_tokens"),
    (lambda w, run: short(run, w, temperature=-1), "temperature"),
    (lambda w, run: short(run, w, top_p=0), "top_p"),
    (lambda w, run: short(run, toy_tokenizer(think=False)), "marks its thoughts"),
    (lambda w, run: short(None, w), "run: expected what kvcomp.patch returns"),
    (lambda w, run: latent(run, w, keep=9), "latent_trajectory: keep"),
    (lambda w, run: latent(run, w, at=100), "two blocks"),
    (lambda w, run: latent(run, w, max_new_tokens=2000), "fewer tokens than max_new_tokens=2000"),
    (lambda w, run: latent(run, w, signal="mood"), "signal"),
    (lambda w, run: thinking.Ask(run, toy_tokenizer(chat=False), chat=True), "chat template"),
    (lambda w, run: thinking.Ask(None, w), "Ask: run"),
    (lambda w, run: thinking.pdr(None, "?", drafts=(3, 2)), "pdr: drafts"),
    (lambda w, run: thinking.pdr(None, "?", writer="muse"), "pdr: writer"),
    (lambda w, run: thinking.pdr(None, "?", workspace=0), "pdr: workspace"),
    (lambda w, run: thinking.pdr(None, "?", again="{question}"), "pdr: again"),
    (lambda w, run: thinking.pdr(None, "?", again="{question} {carry} {x}"), "pdr: again"),
    (lambda w, run: thinking.pdr(None, "?", first="{question} {"), "pdr: first"),
    (lambda w, run: thinking.pdr(None, "?", summary=3), "pdr: summary"),
    (lambda w, run: thinking.sr(None, "?", rounds=0), "sr: rounds"),
    (lambda w, run: thinking.dser(None, "?", iterations=3, last=4), "dser: last"),
    (lambda w, run: thinking.dser(None, "?", refine="{solution}"), "dser: refine"),
    (lambda w, run: thinking.dser(None, "?", verify="{question} {solution} {0}"), "dser: verify"),
    (lambda w, run: thinking.LatentTrajectory(run, block=0), "block"),
    (lambda w, run: thinking.follow_leader(run, run, w, prompt()), "another run"),
    (lambda w, run: thinking.follow_leader(run, None, w, prompt()), "follow_leader: drafter"),
]


@pytest.mark.parametrize(("call", "match"), BAD)
def test_bad_input(model, words, call, match):
    with kvcomp.patch(model, kvcomp.Full()) as run:
        with pytest.raises(ValueError) as error:
            call(words, run)
        assert run.report().tokens_decoded == 0
    text = str(error.value)
    assert text.startswith("kvcomp.thinking: ") and match in text and "\n" not in text
