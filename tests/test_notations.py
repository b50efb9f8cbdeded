"""One value in several notations is one answer, and another value is another."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("math_verify")

from evaluation import equivalence
from evaluation.checkers import CHECKERS
from evaluation.problems import Problem

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
