#!/usr/bin/env bash
# math-verify 0.9.0, a grader of mathematical answers, gives common notations other values:
#   * 1 1/2 equals 1 and not 1.5, while 1\frac12 is read as 3/2;
#   * 1.5e3 is 1.5 * e * 3, while 1.5E3 is 1500;
#   * 50 % equals 50 as well as 0.5, which are not equal to each other;
#   * the tuple or interval (1,2) equals the set {1,2};
#   * x>3 as gold accepts (3,\infty), and (3,\infty) as gold refuses x>3. The docstring of `verify`
#     says so, and has an option for both directions; neither asks whether the inequality is solved:
#     2x+3>9 as gold accepts (3,\infty) too.
# kvcomp: benchmarks/evaluation/notation.py rewrites such answers before math-verify sees them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 sympy==1.14.0 \
  latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"))
FOUND = [  # gold, answer, what verify says
    ("1 1/2", "1", True),
    ("1 1/2", "1.5", False),
    (r"1\frac12", "1.5", True),
    ("1.5e3", "1500", False),
    ("1.5E3", "1500", True),
    ("0.001", "1e-3", False),
    (r"50\%", "50", True),
    (r"50\%", "0.5", True),
    ("50", "0.5", False),
    ("(1,2)", r"\{1,2\}", True),
    (r"\{1,2\}", "(1,2)", True),
    ("x>3", r"(3,\infty)", True),
    (r"(3,\infty)", "x>3", False),
    ("2x+3>9", r"(3,\infty)", True),
]
changed = 0
for gold, answer, found in FOUND:
    one, other = (parse(f"\\boxed{{{text}}}") for text in (gold, answer))
    now = verify(one, other)
    changed += now != found
    print(f"{'as found' if now == found else 'CHANGED '}  gold {gold!r:14} {one[0]!s:22}"
          f"  answer {answer!r:18} {other[0]!s:22}  {'equal' if now else 'different'}")
raise SystemExit(1 if changed else 0)
PYTHON
