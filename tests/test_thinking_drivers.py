"""Drivers: rows that leave, votes, rounds, trajectories; each against a slow or a scripted way."""

import itertools
import random

import pytest
import torch

import kvcomp
from kvcomp import thinking
from kvcomp.testing.models import tiny_model
from kvcomp.thinking import Reply, Rows, Sampling
from kvcomp.thinking.trajectory import signals
from toy_words import WORDS, toy_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
END = WORDS.index("</think>")
METHODS = {
    "full": kvcomp.Full(),
    "delta": kvcomp.Delta.example(32),
    "lazy": kvcomp.LazyEviction.example(32),
    "louis": kvcomp.LouisKV.example(32),
    "delethink": kvcomp.Delethink(chunk=16, carry=8, head=2, max_chunks=None),
    "streaming": kvcomp.Delethink(chunk=16, carry=8, head=2, max_chunks=None, reset="streaming"),
}
WARM = {"temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def words():
    return toy_tokenizer()


def prompt(count=20, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(30, 120, (1, count), generator=generator)}


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


# --- rounds ---------------------------------------------------------------------------------------


def reply(text, prompt_tokens=10, tokens=5):
    return Reply(text, text, prompt_tokens, tokens)


def test_pdr_counts_both_budgets_and_keeps_the_workspace_small():
    calls = []

    def ask(prompts):
        calls.append(list(prompts))
        return [
            reply(f"\\boxed{{{len(calls)}}} " + "x " * 30, 10 * len(calls), 5 + place)
            for place, _ in enumerate(prompts)
        ]

    found = thinking.pdr(ask, "Q?", drafts=(4, 2, 1), workspace=6)
    assert [len(prompts) for prompts in calls] == [4, 1, 2, 1, 1]  # drafts, summary, ...
    assert found.answer == "5" and found.rows == 9
    assert found.sequential_tokens == 18 + 25 + 36 + 45 + 55
    assert found.total_tokens == sum([15, 16, 17, 18], 25) + 35 + 36 + 45 + 55
    carry = calls[2][0].split("wrong:\n")[1].split("\n\nSolve")[0]
    assert len(carry.split()) <= 6 and calls[0] == ["Q?"] * 4


def test_pdr_writers_choose_among_drafts():
    texts = ["\\boxed{1} a", "\\boxed{2} b", "\\boxed{2} c", "d"]
    asked = []

    def ask(prompts):
        asked.append(prompts)
        return [reply(text, 1, len(text) + (text[-1] == "b")) for text in texts[: len(prompts)]]

    thinking.pdr(ask, "Q?", drafts=(4, 1), writer="top", keep=2)
    assert "} c" in asked[-1][0] and "} b" in asked[-1][0] and "} a" not in asked[-1][0]
    asked.clear()
    thinking.pdr(ask, "Q?", drafts=(4, 4, 1), writer="random", keep=1, seed=1)
    assert len(set(asked[1])) > 1  # drawn anew for every next draft
    asked.clear()
    thinking.sr(ask, "Q?", rounds=3)
    assert [len(prompts) for prompts in asked] == [1, 1, 1] and "} a" in asked[1][0]


def test_dser_votes_where_repairs_are_likelier_than_slips():
    """A player that repairs with 0.3 and spoils with 0.1: three quarters of its votes are right."""
    rng = random.Random(0)

    def play(prompts):
        found = []
        for text in prompts:
            if "Write a better solution" in text:
                right = "Solution:\n\\boxed{7}" in text
                right = rng.random() < (0.9 if right else 0.3)
                found.append(reply("\\boxed{7}" if right else f"\\boxed{{{rng.randrange(7)}}}"))
            else:
                found.append(reply("\\boxed{0}"))
        return found

    found = thinking.dser(play, "Q?", chains=40, iterations=30, last=20)
    share = found.votes["7"] / sum(found.votes.values())
    assert found.answer == "7" and abs(share - 0.3 / (0.3 + 0.1)) < 0.08
    assert sum(found.votes.values()) == len(found.lengths) == 40 * 20
    assert found.total_tokens == 15 * 40 * 61 and found.sequential_tokens == 15 * 61


def test_ask_decodes_each_prompt_as_if_alone(model, words):
    """Ragged prompts in one batch; the same text several times is several draws."""
    texts = ["what so", "a much longer one so", "b"]
    with kvcomp.patch(model, kvcomp.Full()) as run:
        ask = thinking.Ask(run, words, temperature=0, max_new_tokens=12)
        together = ask(texts)
        assert [each.text for each in together] == [ask([text])[0].text for text in texts]
        draws = thinking.Ask(run, words, max_new_tokens=12, **WARM)
        assert len({each.text for each in draws(["so"] * 4)}) == 4
        assert draws(["so"])[0].text != draws(["so"])[0].text
    sizes = [len(words(f"<bos>{text}<think>")["input_ids"]) for text in texts]
    assert [each.prompt_tokens for each in together] == sizes


def test_solutions_are_what_stands_behind_the_thought(model, words):
    first = [thinking.BudgetForcing(words, 5, budget=3)]
    with kvcomp.patch(model, kvcomp.Full()) as run:
        ask = thinking.Ask(run, words, max_new_tokens=9, processors=first, **WARM)
        (found,) = ask(["abc"])
    assert found.text.count("</think>") == 1
    assert found.solution == found.text.partition("</think>")[2].strip() and found.tokens == 9


@pytest.mark.parametrize("name", ["full", "lazy", "delethink"])
def test_rounds_of_a_model(model, words, name):
    with kvcomp.patch(model, METHODS[name]) as run:
        ask = thinking.Ask(run, words, max_new_tokens=20, seed=3, **WARM)
        pdr = thinking.pdr(ask, "so what", drafts=(3, 1), workspace=16)
        dser = thinking.dser(ask, "so what", chains=2, iterations=2, last=1)
        assert ask.calls == 3 + 5
    assert pdr.total_tokens > pdr.sequential_tokens > 60 and dser.rows == 10


# --- trajectories ---------------------------------------------------------------------------------


def test_signals_of_a_known_path():
    """Right, right, up: |d| = sqrt 5 over 3 moves of length 1."""
    path = torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1]])[:, None, None]
    found = signals(path)
    assert found["net"].item() == pytest.approx(5**0.5 / 3)
    assert found["cumulative"].item() == pytest.approx(3)
    assert found["aligned"].item() == pytest.approx((2 + 2 + 1) / 5**0.5 / 3)
    assert signals(path[:1])["net"].isnan().all()


def test_a_trajectory_is_that_of_a_second_forward(model):
    with kvcomp.patch(model, kvcomp.Full()) as run:
        with thinking.LatentTrajectory(run, block=7) as heard:
            sampling = Sampling(**WARM, max_new_tokens=25)
            rows = Rows(run, prompt(), sampling, copies=3, followers=[heard], eos=[])
            while len(rows.all[2].ids) < 25:
                if len(rows.all[2].ids) == 10:
                    rows.keep([rows.all[0], rows.all[2]])
                rows.step()
                if len(rows.all[2].ids) == 24:
                    online = heard.signals()
        assert heard.tokens == 24
    for place, number in enumerate((0, 2)):
        text = torch.cat([prompt()["input_ids"], torch.tensor([rows.all[number].ids[:23]])], 1)
        with torch.no_grad():
            states = model(text, output_hidden_states=True).hidden_states
        layers = [*states[1:-1], last_layer(model, text)]
        blocks = [torch.stack([x[0, 20:] for x in layers]).split(7, 1)]
        means = torch.stack([each.mean(1) for each in blocks[0]])[:, :, None]
        wanted = signals(means)
        for name, value in wanted.items():
            torch.testing.assert_close(online[name][place], value[0], rtol=1e-4, atol=1e-5)


def last_layer(model, text):
    """Its output, before the norm that `output_hidden_states` shows it behind."""
    found = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, given, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(text)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("signal", ["cumulative", "aligned", "length"])
def test_latent_trajectory_goes_on_with_the_best(model, words, signal):
    hooks = dict(model.model.layers[0]._forward_hooks)  # transformers leaves some of its own
    with kvcomp.patch(model, kvcomp.LazyEviction.example(32)) as run:
        found = thinking.latent_trajectory(
            run, words, prompt(), k=5, keep=2, at=18, block=8, signal=signal,
            answer_of=lambda text: text[-1:], max_new_tokens=40, **WARM,
        )  # fmt: skip
    assert found.total_tokens == 20 + 3 * 18 + 2 * 40 and len(found.lengths) == 2
    assert model.model.layers[0]._forward_hooks == hooks


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
