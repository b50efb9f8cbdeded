"""bench_language.py: methods that read together see what each sees alone, and runs go on."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

import bench_language

from accuracy.sizes import Room, held_bytes
from kvcomp import Full, LazyEviction, LouisKV, StreamingLLM, patch
from kvcomp.cli.common import load
from kvcomp.methods.cost import Place
from kvcomp.reading import opening, read, scaled, windows
from kvcomp.testing.models import tiny_model
from language import answers, facts, free
from language.capture import Attention
from language.lineup import options
from language.questions import Question, Writer, kinds
from language.rounding import rounding
from language.sizes import sized
from language.stack import Stack

CPU = torch.device("cpu")
SMALL = ["--model", "reasoner", "--tokens", "64", "--windows", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def reasoner(one_thread):
    return load("reasoner", "cpu", "float32")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCOMP_CACHE", str(tmp_path / "cache"))


def test_together_is_alone(reasoner):
    model, tokenizer = reasoner
    ids = torch.tensor([window.ids for window in windows(tokenizer, 2, 64)])
    methods = [
        Full(),
        LazyEviction(budget=24, window=8, alpha=0.05),
        StreamingLLM(budget=24),
        LouisKV(budget=16, sinks=4, local=8, segment=(2, 4), cluster_size=4),
    ]
    names = ["model"] * len(methods) + ["int8", "int8-plain", "int4"]
    methods += [Full(), LazyEviction(budget=24, window=8, alpha=0.05), Full()]
    stack = Stack(model, methods, names)
    before = model.config._attn_implementation
    found = stack.read(ids, 16, lambda: None)
    assert model.config._attn_implementation == before
    for method, name, hidden, report in zip(methods, names, found, stack.reports(), strict=True):
        with rounding(name):
            expected, alone = read(model, method, ids, 16, **options(name))
        torch.testing.assert_close(hidden, expected, atol=2e-3, rtol=1e-3)
        for name in ("tokens_attended", "kv_bytes_peak", "tracking_bytes_peak", "retrievals"):
            assert getattr(report, name) == getattr(alone, name), (method, name)


def test_kinds_of_k_and_v_err_in_their_order(reasoner, capsys):
    """Eight bits less than without the Hadamard matrix, four far more."""
    kinds = ["int8", "int8-plain", "int4"]
    args = [*SMALL, "--methods", "full", "--kv", *kinds]
    assert bench_language.main(args) == 0
    said = capsys.readouterr().out.partition("over all windows")[2]
    kl = {name: float(re.search(rf"full@{name} .*KL ([\d.]+)", said)[1]) for name in kinds}
    assert kl["int8"] <= kl["int8-plain"] < 0.001 < 0.005 < kl["int4"]


@pytest.mark.parametrize("part", ["loss", "free", "premises"])
def test_a_run_goes_on_where_it_stopped(part, tmp_path, capsys):
    file = tmp_path / "rows.json"
    args = ["--part", part, *SMALL, "--budgets", "3/4", "--json", str(file)]
    args += ["--methods", "full", "lazy-eviction", "--stack", "1"]
    assert bench_language.main([*args, "--cells", "1"]) == 0
    first = json.loads(file.read_text())["rows"]
    assert bench_language.main(args) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 and rows[: len(first)] == first
    said = capsys.readouterr().out
    assert bench_language.main(args) == 0  # nothing is left, and the tables are the same
    again = capsys.readouterr().out
    last = said.splitlines()[-1]
    assert re.search(r"\d", last) and again.splitlines()[-1] == last
    assert bench_language.main([*args, "--tokens", "80"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    assert torch.get_float32_matmul_precision() == "highest"  # less is bf16 on some CPUs


def test_captured_attention_is_that_of_the_layers_which_see_everything():
    model = tiny_model("gemma3_text")
    ids = torch.arange(3, 43)
    model.set_attn_implementation("eager")
    want = model(ids[None], output_attentions=True).attentions
    full = [x for x, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    captured = Attention(model, ids)
    assert len(captured.layers) == len(full) == 3
    for place, layer in enumerate(full):
        torch.testing.assert_close(captured.probabilities(place, torch.arange(40)), want[layer][0])


class Letters:
    """A tokenizer that knows every character."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) for letter in text]}


class Beginning(Letters):
    """One that puts a token before every text, and one behind it."""

    bos_token_id, eos_token_id = 2, 1

    def __call__(self, text, add_special_tokens=True, **kwargs):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [2, *ids, 1] if add_special_tokens else ids}


def test_what_is_read_begins_as_the_tokenizer_begins_a_text():
    assert opening(Letters()) == () and opening(Beginning()) == (2,)
    for plain, begun in zip(windows(Letters(), 2, 40), windows(Beginning(), 2, 40), strict=True):
        assert begun.ids == (2, *plain.ids[1:]) and begun.first == plain.first
    question = Writer(Beginning()).write("pass-key", 0, 2, 400)
    assert question.ids[0] == 2 and len(question.ids) == 400 and 2 not in question.ids[1:]


@pytest.mark.parametrize("kind", kinds(1600))
def test_questions_end_with_their_answer(kind):
    for place in range(2):
        question = Writer(Letters()).write(kind, place, 2, 1600)
        assert len(question.ids) == 1600
        text = "".join(map(chr, question.ids))
        answer = text[-question.answer :]
        assert re.fullmatch(r" \d{5}", answer) and answer in text[:-6]
        if kind.startswith("late"):
            seen = text.rindex(f"The pass key is{answer}.\n\n") + len("The pass key is 12345.\n\n")
            asked = text.rindex("\n\nThe pass key is")
            assert asked - seen == int(kind.split()[1])


def test_an_answer_counts_when_all_its_tokens_are_best(reasoner):
    model, tokenizer = reasoner
    ids = torch.tensor([windows(tokenizer, 1, 32)[0].ids])
    [(written, _)] = free.written(model, [({"method": "full"}, Full())], ids, 4, lambda: None)
    right = (*ids[0].tolist(), *written[0].tolist())
    wrong = (*right[:-3], (right[-3] + 1) % model.config.vocab_size, *right[-2:])
    study = object.__new__(answers.Answers)
    study.model = model
    for sequence, expected in ((right, True), (wrong, False)):
        with torch.no_grad():
            hidden = model.get_decoder()(torch.tensor([sequence])).last_hidden_state[:, :-1]
        assert study._right(hidden, [Question("pass-key", sequence, 4, 0.5)]) == [expected]


def test_writing_together_is_generate(reasoner):
    model, tokenizer = reasoner
    prompts = torch.tensor([window.ids for window in windows(tokenizer, 2, 16)])
    methods = [Full(), StreamingLLM(budget=20)]
    found = free.written(
        model, [({"method": m.name}, m) for m in methods], prompts, 24, lambda: None
    )
    for method, (ids, report) in zip(methods, found, strict=True):
        with patch(model, method) as run:
            expected = model.generate(
                prompts, max_new_tokens=24, do_sample=False, eos_token_id=None
            )
        assert torch.equal(ids, expected[:, 16:]), method
        assert report.kv_bytes_peak == run.report().kv_bytes_peak


def test_figures_of_a_text_that_departs_and_loops():
    dense = torch.arange(20)[None]
    departed = dense.clone()
    departed[0, 7] = 0
    assert free.figures(departed, dense)["same"] == [7]
    assert free.figures(dense, dense) == {"same": [20], "repeated": [0.0]}
    assert free.repeated([1, 2] * 10) == pytest.approx(1 - 2 / 13)


def test_methods_that_are_none_are_named(capsys):
    assert bench_language.main([*SMALL, "--methods", "nothing"]) == 2
    assert "got 'nothing'" in capsys.readouterr().err
    assert bench_language.main([*SMALL, "--methods", "delta:nothing=1"]) == 2
    assert "delta has no field 'nothing'" in capsys.readouterr().err


def test_digests_leave_room_for_what_they_stand_for():
    """A quarter of 1024 tokens in 16 bits: with segments of 4 tokens it would be full of them."""
    room = Room("smollm2-135m", Place(1023, 128, 30, 9, 3, 64, 2), torch.bfloat16, CPU)
    method = sized("louis-kv", room.context_bytes // 4, room, {})
    assert method.segment == (8, method.cluster_size) and method.budget > 80
    assert held_bytes(method, room) <= room.context_bytes // 4
    for name in ("louis-kv", "cluster-kv", "quest", "stride-retrieval", "free-kv"):
        assert scaled(name, 128, "smollm2-135m").most_resident == 128, name


def test_what_a_plain_window_holds_of_a_fact_is_what_lies_in_it(reasoner, monkeypatch):
    args = ["--part", "facts", "--model", "reasoner", "--tokens", "512", "--questions", "3"]
    asked = bench_language.parse([*args, "--budgets", "3/4", "--methods", "recency-window"])
    study = facts.Facts(*reasoner, asked)
    study.facts = [find_at(study.facts[0], first) for first in (40, 200, 440)]
    [row] = study.run(lambda what, steps: lambda: None)
    budget = int(re.search(r"budget=(\d+)", row["parameters"])[1])
    for fact, seen in zip(study.facts, row["facts"], strict=True):
        inside = [place for place in fact.digits if place >= fact.asked - budget]
        assert seen["held"] == pytest.approx(len(inside) / len(fact.digits))
        assert 0 <= seen["hit_by_question"] <= 1 and seen["since_hit"] <= fact.asked


def find_at(fact, first):
    return replace(fact, mentions=(tuple(range(first, first + 5)),))


def test_attended_counts_hits_before_and_by_the_question():
    class Given:
        layers = ((torch.zeros(2, 7, 4), torch.zeros(1, 7, 4), 1.0),)

        def probabilities(self, layer, steps):
            probs = torch.zeros(2, 7, 7)
            probs[0, 2, 1] = 0.6  # token 1 is hit in step 2 by one head,
            probs[1, 5, 1] = 0.5  # and by the question
            probs[1, 3, 0] = probs[0, 3, 2] = 0.5
            return probs[:, steps]

    fact = facts.Fact(Question("pass-key", tuple(range(7)), 1, 0.5), 5, ((1,), (4,)))
    seen = facts.attended(Given(), fact, 2)
    assert seen == {"since_hit": 3, "hit_lately": 0.0, "hit_by_question": 0.5}
