"""Problem files are read, or refused with line and field; answers are graded by value."""

import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("math_verify")

from evaluation import equivalence
from evaluation.checkers import CHECKERS, last_boxed
from evaluation.problems import TEMPLATE, Problem, encode, load
from kvcomp.reasoner import task

PROBLEMS = Path(__file__).parent / "data" / "problems.jsonl"


def grade(checker, answer, text, choices=()):
    return CHECKERS[checker](Problem("1", answer, checker, choices=choices), text)


# --- mathematics ----------------------------------------------------------------------------------

EQUAL = [
    ("33", "33"),
    ("33", "033"),
    ("033", "33"),
    ("0", "000"),
    ("7", "7.0"),
    ("7", "7."),
    ("7", " 7 "),
    ("7", "$7$"),
    ("-3", "-3"),
    ("-3", "- 3"),
    ("-3", "{-3}"),
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("10000", "10{,}000"),
    ("10000", "10\\,000"),
    ("1234567", "1,234,567"),
    ("1024", "2^{10}"),
    ("120", "5!"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", ".5"),
    ("\\frac{1}{2}", "\\dfrac{1}{2}"),
    ("\\frac{1}{2}", "\\tfrac12"),
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{1}{2}", "\\frac{2}{4}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("-\\frac{1}{2}", "-0.5"),
    ("1\\frac{1}{2}", "1.5"),
    ("\\frac{3}{4}", "75\\%"),
    ("90", "90^\\circ"),
    ("90^{\\circ}", "90"),
    ("5", "5\\text{ cm}"),
    ("5\\text{ cm}^2", "5"),
    ("6", "6 \\text{ ways}"),
    ("5", "\\$5.00"),
    ("5", "x = 5"),
    ("x=5", "5"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt2}"),
    ("11\\sqrt{2}", "11 \\sqrt 2"),
    ("\\pi", "\\pi"),
    ("2x+3", "3 + 2x"),
    ("x^2-1", "(x-1)(x+1)"),
    ("1+2i", "2i+1"),
    ("3", "\\log_2 8"),
    ("(1,2)", "(1, 2)"),
    ("(1,2)", "\\left(1, 2\\right)"),
    ("1,2", "2, 1"),
    ("\\{1,2\\}", "\\{2, 1\\}"),
    ("\\{1,2\\}", "\\left\\{ 1, 2 \\right\\}"),
    ("2,-2", "\\pm 2"),
    ("[0,1)", "\\left[0, 1\\right)"),
    ("(0,1)\\cup(2,3)", "(2,3) \\cup (0,1)"),
    ("\\infty", "\\infty"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{Evelyn}", "\\textbf{Evelyn}"),
    ("\\text{even}", "\\text{even}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
]
DIFFERENT = [
    ("33", "34"),
    ("33", "330"),
    ("-3", "3"),
    ("1000", "100"),
    ("1,000", "1"),
    ("\\frac{1}{3}", "0.333"),
    ("\\frac{1}{2}", "2"),
    ("\\frac{1}{2}", "\\frac{1}{-2}"),
    ("\\pi", "3.14"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("1,2,3", "1,2"),
    ("3", "3 \\text{ or } 4"),
    ("\\infty", "-\\infty"),
    ("2x+3", "2x-3"),
    ("\\text{even}", "\\text{odd}"),
    ("5", "\\text{five}"),
    ("5", "?"),
    ("5", "\\frac{5"),
    ("5", "\\text{none of these}"),
    ("5", "9" * 2005),
    ("5", "\\frac{1}{0}"),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_answers_of_the_same_value_are_right(gold, answer):
    found = grade("math", gold, f"So it is $\\boxed{{{answer}}}$.")
    assert found.correct and found.answer == answer.strip()


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_answers_of_another_value_are_wrong(gold, answer):
    assert not grade("math", gold, f"So it is $\\boxed{{{answer}}}$.").correct


# Where math-verify by itself has another opinion, or one for each direction.
SAME = [
    ("1 1/2", "1.5"),
    ("1 1/2", "3/2"),
    ("1 1/2", "\\frac{3}{2}"),
    ("1 1/2", "1\\frac{1}{2}"),
    ("1\\ 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("x = 2 1/4", "\\frac94"),
    ("2 1/2 \\text{ cups}", "2.5"),
    ("1 1/2, 2 1/2", "5/2, 3/2"),
    ("1.5e3", "1500"),
    ("1.5E3", "1500"),
    ("1e-3", "0.001"),
    ("2.5e-2", "\\frac{1}{40}"),
    ("6.02e23", "6.02 \\times 10^{23}"),
    ("-3e+2", "-300"),
    ("x = 2e3", "2000"),
    ("1.5 × 10^3", "1500"),
    ("1 000 000", "10^6"),
    ("0.\\overline{3}", "\\frac{1}{3}"),
    ("0.1\\overline{6}", "\\frac{1}{6}"),
    ("50\\%", "0.5"),
    ("50%", "\\frac{1}{2}"),
    ("50 \\%", "50%"),
    ("50 \\text{ percent}", "50\\%"),
    ("12 1/2\\%", "0.125"),
    ("\\frac{1}{2}\\%", "0.005"),
    ("100\\%", "1"),
    ("(1,2)", "(1, 2)"),
    ("(1,2)", "(\\frac{2}{2}, 2)"),
    ("(3,5,7)", "(3, 5, 7.0)"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("\\{1,2\\}", "2,1"),
    ("\\{(1,2),(3,4)\\}", "(3,4),(1,2)"),
    ("x>3", "(3,\\infty)"),
    ("x > 3", "3 < x"),
    ("x \\ge 3", "[3,\\infty)"),
    ("x ≥ 3", "[3,∞)"),
    ("x<3", "(-\\infty,3)"),
    ("y \\leq -\\frac{1}{2}", "(-\\infty,-0.5]"),
    ("1<x<3", "(1,3)"),
    ("-2 \\le x < 3", "[-2,3)"),
    ("3 > x \\ge -2", "[-2,3)"),
    ("x > 1 \\text{ and } x < 3", "(1,3)"),
    ("1 < x < 3", "x > 1 and x < 3"),
    ("x<1 \\text{ or } x>3", "(-\\infty,1)\\cup(3,\\infty)"),
    ("x \\neq 3", "(-\\infty,3)\\cup(3,\\infty)"),
    ("x \\in (3,\\infty)", "x > 3"),
    ("x\\in[1,2]", "1\\le x\\le 2"),
    ("\\theta > \\frac{\\pi}{2}", "(\\frac{\\pi}{2},\\infty)"),
]
OTHER = [
    ("1 1/2", "1"),
    ("1 1/2", "\\frac{1}{2}"),
    ("1 1/2", "11/2"),
    ("1\\,1/2", "11/2"),
    ("1  1/2", "11/2"),
    ("-1 1/2", "-0.5"),
    ("2 1/2", "1"),
    ("1.5e3", "1.5"),
    ("1.5e3", "150"),
    ("1e-3", "1000"),
    ("1 000", "1"),
    ("0.\\overline{3}", "0.3"),
    ("50\\%", "50"),
    ("50%", "50"),
    ("50 \\text{ percent}", "50"),
    ("5\\%", "0.5"),
    ("100\\%", "100"),
    ("(1,2)", "\\{1,2\\}"),
    ("(2,1)", "\\{1,2\\}"),
    ("[1,2]", "\\{1,2\\}"),
    ("\\left(1,2\\right)", "\\left\\{1,2\\right\\}"),
    ("(3,5,7)", "\\{3,5,7\\}"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "2,1"),
    ("(1,2)", "[1,2]"),
    ("x>3", "[3,\\infty)"),
    ("x>3", "(-\\infty,3)"),
    ("x>3", "(3,4)"),
    ("x>3", "x<3"),
    ("x>3", "x\\ge3"),
    ("x>3", "y>3"),
    ("x>3", "3"),
    ("2x+3>9", "(3,\\infty)"),
    ("1<x<3", "[1,3]"),
    ("1<x<3", "x<1 or x>3"),
    ("x<1 \\text{ or } x>3", "(1,3)"),
    ("x \\neq 3", "3"),
]


@pytest.mark.parametrize("one, other", SAME)
def test_notations_of_the_same_value(one, other):
    assert equivalence.equal(one, other) and equivalence.equal(other, one)


@pytest.mark.parametrize("one, other", OTHER)
def test_notations_of_another_value(one, other):
    assert not equivalence.equal(one, other) and not equivalence.equal(other, one)


def test_a_bare_number_is_a_percentage_where_one_is_asked_for():
    def graded(question, gold, said):
        problem = Problem("1", gold, "math", messages=({"role": "user", "content": question},))
        return CHECKERS["math"](problem, f"\\boxed{{{said}}}").correct

    asked = "What percentage of the balls is red?"
    for gold, said in (("50", "50\\%"), ("50\\%", "50"), ("50\\%", "1/2"), ("12.5", "12 1/2\\%")):
        assert graded(asked, gold, said) and graded(asked, said, gold)
    assert not graded(asked, "50\\%", "0.5")  # half a per cent
    assert graded("Which share of the balls is red?", "0.5", "50\\%")
    assert not graded("How many balls are red?", "50", "50\\%")


BOXES = [
    ("\\boxed{5}", "5"),
    ("\\boxed{4} no, \\boxed{5}", "5"),
    ("\\boxed {5}", "5"),
    ("\\fbox{5}", "5"),
    ("$$\\boxed{\\frac{1}{\\sqrt{2}}}$$", "\\frac{1}{\\sqrt{2}}"),
    ("\\boxed{\\{1, \\{2\\}\\}}", "\\{1, \\{2\\}\\}"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("\\\\boxed{5}", "5"),
    ("\\boxed{5} and then \\boxed{6", "5"),
    ("{ a stray brace \\boxed{5} }", "5"),
    ("} another \\boxed{5}", "5"),
    ("\\boxed{5}}}}", "5"),
    ("\\boxed{a \\} b}", "a \\} b"),
    ("\\boxed{}", None),
    ("\\boxed{5} \\boxed{ }", None),
    ("\\boxed{\\frac{1}{2}", None),
    ("\\boxed", None),
    ("\\boxed5", None),
    ("boxed{5}", None),
    ("the answer is 5", None),
    ("", None),
]


@pytest.mark.parametrize("text, content", BOXES)
def test_the_last_closed_box_is_the_answer(text, content):
    assert last_boxed(text) == content


THOUGHTS = [
    ("<think>\\boxed{4}</think> It is \\boxed{5}.", True, True),
    ("<think>\\boxed{5}</think> It is \\boxed{4}.", False, False),
    ("<think>\\boxed{5}</think> It is five.", True, False),
    ("\\boxed{4} ... \\boxed{5}", True, False),
    ("<think> is it \\boxed{5}? Wait, \\boxed{4", True, False),
    ("</think>\\boxed{5}</think>", True, True),
    ("5", False, False),
    ("", False, False),
]


@pytest.mark.parametrize("text, right, concluded", THOUGHTS)
def test_an_answer_behind_the_thought_counts_first(text, right, concluded):
    assert grade("math", "5", text).correct == right
    assert grade("math-concluded", "5", text).correct == concluded
    letters = text.replace("4", "D").replace("5", "C")
    assert grade("choice", "C", letters).correct == right
    assert grade("choice-concluded", "C", letters).correct == concluded


GARBAGE = [
    "\\boxed{" * 15_000,
    "\\boxed{" * 15_000 + "}" * 15_000,
    "{" * 100_000,
    "}" * 100_000,
    "\\" * 100_000,
    "\\boxed{" + "x" * 100_000 + "}",
    "\\boxed{" + "(" * 1_500 + "}",
    "\\boxed{" + "\\frac{1}{" * 200 + "2" + "}" * 201,
    "answer" + " " * 100_000,
    "answer is " * 10_000,
    "Answer: " + "\\text{" * 15_000,
    "\n" * 100_000,
    "\x00\ud800\u2028 \\boxed{\x00\ud800}",
    "</think>" * 10_000,
]


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("place", range(len(GARBAGE)))
def test_garbage_is_wrong_and_raises_nothing(checker, place, monkeypatch):
    monkeypatch.setattr(equivalence, "SECONDS", 1.0)
    walk = task.make_problem(nodes=4, steps=8)
    problem = Problem("1", "5", checker, prompt=walk.prompt)
    assert not CHECKERS[checker](problem, GARBAGE[place]).correct


def test_what_never_ends_is_stopped_and_the_next_is_graded(monkeypatch):
    monkeypatch.setattr(equivalence, "SECONDS", 0.5)  # less than math-verify gives itself
    assert not grade("math", "5", "\\boxed{9^{9^{9^{9}}}}").correct
    monkeypatch.undo()
    assert grade("math", "1.5", "\\boxed{\\frac{3}{2}}").correct


def test_a_comparison_that_dies_is_wrong_and_the_next_is_graded():
    assert grade("math", "0.25", "\\boxed{\\frac14}").correct
    equivalence._child.process.kill()
    equivalence._child.process.wait()
    assert not grade("math", "0.25", "\\boxed{\\frac14}").correct
    assert grade("math", "0.25", "\\boxed{\\frac14}").correct


def test_any_thread_may_grade():
    found = {}

    def work(number):
        found[number] = [
            grade("math", str(number), f"\\boxed{{\\frac{{{2 * x}}}{{2}}}}").correct
            for x in (number, number + 1)
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [True, False] for number in range(4)}


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(equivalence, "find_spec", lambda name: None)
    for ask in (lambda: grade("math", "5", "\\boxed{5}"), lambda: load(PROBLEMS)):
        with pytest.raises(ImportError, match=r"pip install 'kvcomp\[bench\]'"):
            ask()
    assert grade("choice", "C", "\\boxed{C}").correct  # needs none


# --- choices, last lines, walks -------------------------------------------------------------------

SAID = [
    ("\\boxed{C}", "C"),
    ("\\boxed{\\text{C}}", "C"),
    ("\\boxed{\\text{(C)}}", "C"),
    ("\\boxed{\\textbf{C) 59}}", "C"),
    ("\\boxed{c}", "C"),
    ("\\boxed{(c)}", "C"),
    ("\\boxed{$C$}", "C"),
    ("\\boxed{C. fifty nine}", "C"),
    ("\\boxed{59}", "C"),
    ("\\boxed{D} no: \\boxed{C}", "C"),
    ("Answer: C", "C"),
    ("**Answer:** C", "C"),
    ("**Answer: C**", "C"),
    ("Answer:\n\n**C**", "C"),
    ("answer: \\(C\\)", "C"),
    ("Answer: $\\text{C}$", "C"),
    ("The correct answer is (C).", "C"),
    ("The final answer is option C, clearly.", "C"),
    ("Option A is wrong. The correct choice is C because it is prime.", "C"),
    ("Answer: D. No! Answer: C", "C"),
    ("\\boxed{A} </think> Answer: C", "C"),
    ("\\boxed{a dog}", None),
    ("\\boxed{A cat}", None),
    ("\\boxed{61}", None),
    ("\\boxed{E}", None),
    ("The answer is Cats", None),
    ("The answer is I think that", None),
    ("Choosing A is tempting.", None),
    ("C", None),
    ("", None),
]


@pytest.mark.parametrize("text, letter", SAID)
def test_a_choice_is_boxed_or_said(text, letter):
    choices = ("51", "57", "59", "63")
    found = grade("choice", "C", text, choices)
    assert found.answer == letter and found.correct == (letter == "C")
    assert not grade("choice", "B", text, choices).correct


@pytest.mark.parametrize(
    "text, right",
    [
        ("neves", True),
        ("It is\n  neves  \n\n", True),
        ("neves\nor so", False),
        ("Neves", False),
        ("<think>neves</think>\nneves", True),
        ("", False),
    ],
)
def test_exact_is_the_last_line(text, right):
    assert grade("exact", "neves", text).correct == right


def test_steps_are_graded_as_the_reasoner_does():
    walk = task.make_problem(nodes=6, steps=12, seed=3)
    problem = Problem("1", walk.gold(), "steps", prompt=walk.prompt)
    right = CHECKERS["steps"](problem, walk.gold())
    assert right.correct and right.steps == right.first_visit == 1.0
    words = walk.gold().split()
    text = " ".join([*words[:20], *words[24:]])  # the sixth step is missing
    expected = task.grade(walk, text)
    found = CHECKERS["steps"](problem, text)
    assert (found.correct, found.steps) == (False, expected.step_accuracy)
    assert 0 < found.steps < 1 and found.first_visit == expected.first_visit_accuracy


# --- files ----------------------------------------------------------------------------------------


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
