"""Answers are found in what a model says, and graded by value."""

import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("math_verify")

from evaluation import equivalence
from evaluation.checkers import CHECKERS, last_boxed
from evaluation.problems import Problem, load
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
    monkeypatch.setattr(equivalence, "SECONDS", 0.5)
    assert not grade("math", "5", "\\boxed{9^{9^{9^{9}}}}").correct
    monkeypatch.undo()
    assert grade("math", "1.5", "\\boxed{\\frac{3}{2}}").correct


def test_a_busy_machine_does_not_change_a_grade(monkeypatch):
    """A child that is stopped for longer than a pair may take goes on where it was."""
    assert grade("math", "0.25", "\\boxed{\\frac14}").correct
    monkeypatch.setattr(equivalence, "SECONDS", 1.0)
    child = equivalence._child.process
    child.send_signal(signal.SIGSTOP)
    threading.Timer(1.5, child.send_signal, [signal.SIGCONT]).start()
    assert grade("math", "1.5", "\\boxed{\\frac{3}{2}}").correct
    assert equivalence._child.process is child


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
