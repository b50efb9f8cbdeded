"""Problem files are read, or refused with line and field."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("math_verify")

from evaluation.checkers import CHECKERS
from evaluation.problems import TEMPLATE, encode, load
from kvcomp.reasoner import task

PROBLEMS = Path(__file__).parent / "data" / "problems.jsonl"


def test_a_file_is_read_in_all_its_forms():
    problems = {problem.id: problem for problem in load(PROBLEMS)}
    assert {name: problem.answer for name, problem in problems.items()} == {
        "oranges": "126",
        "linear": "5",
        "fraction": "\\frac{5}{12}",
        "padded": "001",
        "roots": "\\{-2, 3\\}",
        "interval": "(-2, 4)",
        "tiles": "96",
        "solution": "100",
        "letter": "C",
        "place": "A",
        "shuffled": "ABCD"[problems["shuffled"].choices.index("12")],
        "last-line": "neves",
        "asked": "4",
    }
    assert problems["linear"].messages == (
        {"role": "user", "content": TEMPLATE.replace("{question}", "Solve 5x - 7 = 2x + 8 for x.")},
    )
    assert "{braces}" in problems["roots"].messages[0]["content"]
    assert set(problems["shuffled"].choices) == {"6", "8", "12", "24"}
    assert problems["last-line"].prompt.startswith("Spell") and not problems["last-line"].messages
    assert problems["asked"].messages[0]["content"].startswith("What is 2 + 2?")
    again = {problem.id: problem for problem in load(PROBLEMS)}
    assert again == problems, "choices are shuffled differently"
    assert [problem.id for problem in load(PROBLEMS, count=2)] == ["oranges", "linear"]


def test_a_template_has_question_and_choices():
    template = "Choose \\boxed{}:\n{choices}\n{question}"
    place = next(x for x in load(PROBLEMS, template=template) if x.id == "place")
    assert place.messages[0]["content"] == (
        "Choose \\boxed{}:\nA) 2/3\nB) 3/5\nC) 5/8\nWhich is the largest?"
    )
    with pytest.raises(ValueError, match=r"template: expected \{question\}, got 'no place'"):
        load(PROBLEMS, template="no place")


def test_every_right_answer_of_the_file_is_right():
    for problem in load(PROBLEMS):
        said = problem.answer if problem.checker == "exact" else f"\\boxed{{{problem.answer}}}"
        assert CHECKERS[problem.checker](problem, said).correct, problem.id


GOOD = {"id": "a", "prompt": "1 + 1?", "answer": "2"}
BAD = [
    ("{", "line 2: "),
    ("[1]", "line 2: expected an object"),
    ({"id": "a", "prompt": "x"}, "line 2: answer: expected text or a number, got None"),
    ({**GOOD, "id": "first"}, "line 2: id: expected one that no line before has, got 'first'"),
    ({**GOOD, "id": 1.5}, "line 2: id: expected a string or a number, got 1.5"),
    ({**GOOD, "id": True}, "line 2: id: expected a string or a number, got True"),
    ({**GOOD, "answer": ["2"]}, "line 2: answer: expected text or a number, got "),
    ({**GOOD, "answer": "  "}, "line 2: answer: expected an answer, got '  '"),
    ({**GOOD, "checker": "maths"}, "line 2: checker: expected one of math, choice, "),
    ({**GOOD, "ids": [1]}, "line 2: ids: expected prompt or ids, got 'both'"),
    ({**GOOD, "prompt": ""}, "line 2: prompt: expected some text, got ''"),
    ({"ids": [1, -1], "answer": 1}, "line 2: ids: expected a list of token ids, got "),
    ({"messages": [], "answer": 1}, "line 2: messages: expected a list of messages with role and "),
    ({"messages": ["hi"], "answer": 1}, "line 2: messages: expected a list of messages with "),
    ({"answer": 1, "text": "?"}, "line 2: prompt: expected one of messages, prompt, ids, "),
    ({"answer": 1, "question": " "}, "line 2: question: expected some text, got ' '"),
    ({**GOOD, "choices": "AB"}, "line 2: choices: expected 2 to 10 texts, got 'AB'"),
    ({**GOOD, "choices": ["one"]}, "line 2: choices: expected 2 to 10 texts, got "),
    ({**GOOD, "choices": ["x", "y"]}, "line 2: answer: expected a letter of AB, a place from 0, "),
    ({**GOOD, "choices": ["x", "y"], "answer": 2}, "line 2: answer: expected a letter of AB, "),
    ({**GOOD, "checker": "steps"}, "problem 'a': the steps checker expects a switch walk"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[message for _, message in BAD])
def test_a_bad_line_is_refused_by_line_and_field(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    second = line if isinstance(line, str) else json.dumps(line)
    file.write_text(json.dumps({**GOOD, "id": "first"}) + "\n" + second)
    with pytest.raises(ValueError) as error:
        load(file)
    assert message in str(error.value)
    assert str(error.value).startswith("kvcomp")


def test_an_empty_or_missing_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one problem, got none"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="cannot read problems"):
        load(tmp_path / "missing.jsonl")


def test_separators_within_a_text_end_no_line(tmp_path):
    file = tmp_path / "text.jsonl"
    line = json.dumps({**GOOD, "prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    file.write_text(line + "\r\n", encoding="utf-8", newline="")
    assert load(file)[0].prompt == "a\u2028b\x85c"


def test_what_is_read_can_be_traced_and_encoded(tmp_path):
    from transformers import AutoTokenizer

    from kvcomp import reasoner

    walk = task.make_problem(nodes=4, steps=8)
    file = tmp_path / "walks.jsonl"
    lines = [
        {"id": 1, "prompt": walk.prompt, "answer": walk.gold(), "checker": "steps"},
        {"id": 2, "ids": [1, 5, 7], "answer": "x", "checker": "exact"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    problems = load(file)
    assert [problem.line() for problem in problems] == [
        {"id": "1", "prompt": walk.prompt},
        {"id": "2", "ids": (1, 5, 7)},
    ]
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    first, second = encode(problems, tokenizer)
    assert first == tokenizer(walk.prompt)["input_ids"] and second == [1, 5, 7]
    with pytest.raises(ValueError, match="chat template"):
        encode(load(PROBLEMS, count=1), tokenizer)
