r"""Answers in the notation that math-verify reads as it is meant.

math-verify 0.9.0 takes 1 1/2 for 1, 1.5e3 for a product with Euler's number, 50 % for both 50 and
0.5, an interval or a tuple for a set of the same members, and x > 3 for (3, \infty) only where the
inequality is the gold answer. Here every one of these gets one meaning before it is asked:

* 1 1/2 and 1\frac12 are 3/2; 1.5e3 is 1500; 1 000 000 is a million; 0.\overline{3} is 1/3;
* 50 % is 0.5, and not 50, unless the question asks for a percentage: then a bare 50 means 50 % too;
* (1, 2) and [1, 2] have an order, and are not {1, 2};
* an inequality solved for a variable (x > 3, 1 < x <= 3, x < 1 or x > 3) is its interval.
"""

from __future__ import annotations

import re

_SIGNS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "√": r"\sqrt ",
    "°": r"^\circ ",
}
_SPACES = re.compile(r"(?<!\\)\\[,!;: ]|~|\\q?quad\b|\s+")
_RELATIONS = {
    "≤": r"\\leqslant|\\leq|\\le(?![a-z])|<=",
    "≥": r"\\geqslant|\\geq|\\ge(?![a-z])|>=",
    "≠": r"\\neq|\\ne(?![a-z])|!=",
    "∈": r"\\in(?![a-z])",
    "<": r"\\lt(?![a-z])",
    ">": r"\\gt(?![a-z])",
}
_RELATION = re.compile("[<>≤≥≠∈]")
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_OR = re.compile(r"\\text\{\s*or\s*\}|\\lor(?![a-z])|\\vee(?![a-z])|(?<![a-zA-Z\\])or(?![a-zA-Z])")
_AND = re.compile(
    r"\\text\{\s*and\s*\}|\\land(?![a-z])|\\wedge(?![a-z])|(?<![a-zA-Z\\])and(?![a-zA-Z])"
)
_VARIABLE = re.compile(r"[a-zA-Z]|\\(?!infty|pi(?![a-z]))[a-z]+")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*percent\s*\}|percent)$")
_ASKS_PERCENT = re.compile(r"\bpercent(?:age)?s?\b", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:[\d.,\s/{}]|\\frac)+")
_LATEX_FRACTION = r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))"
_MIXED = (
    re.compile(r"(?<![\w.}^/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])"),
    re.compile(r"(?<![\w.}^/])(\d+)\s*" + _LATEX_FRACTION),
)
_SCIENTIFIC = re.compile(r"(?<![\w.\\^])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,4})(?![\w.^{])")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.])")
_REPEATING = re.compile(r"(?<![\w.])(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")


def asks_percent(question: str) -> bool:
    """Whether a question is about a percentage, so that a bare number may stand for one."""
    return _ASKS_PERCENT.search(question) is not None


def alike(gold: str, answer: str, percent: bool = False) -> tuple[str, str] | None:
    """Both answers in one notation; None: they are of kinds that are never equal."""
    pair = (_plain(gold), _plain(answer))
    if {_bracket(text) for text in pair} in ({"set", "round"}, {"set", "square"}):
        return None
    return _percentages(*_intervals(*pair), percent)


def _plain(text: str) -> str:
    """Numbers as math-verify reads them, one space for every kind of space."""
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", text)
    text = re.sub(r"(?<=\d)\\[,!;: ](?=\d{3})|(?<=\d)~(?=\d{3})", "", text)
    text = _SPACES.sub(" ", text).strip().strip("$").rstrip(". ")
    text = _THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    for mixed in _MIXED:
        text = mixed.sub(_improper, text)
    text = _SCIENTIFIC.sub(lambda match: rf"{match[1]}\times 10^{{{int(match[2])}}}", text)
    return _REPEATING.sub(_repeating, text)


def _improper(match: re.Match[str]) -> str:
    whole, top, bottom = (int(part) for part in match.groups() if part is not None)
    if not 0 < top < bottom:
        return match[0]  # a product, or nothing that anybody means
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, again = match.groups()
    bottom = 10 ** len(fixed) * (10 ** len(again) - 1)
    top = int(f"{whole or 0}{fixed}{again}") - int(f"{whole or 0}{fixed}")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _bracket(text: str) -> str | None:
    """What encloses a list as a whole: "set", "round" or "square" (also half of it)."""
    text = re.sub(r"^(?:[a-zA-Z]\s*(?:=|\\in(?![a-z])))\s*", "", text)
    text = text.replace(r"\{", "⦃").replace(r"\}", "⦄").strip()
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{⦃") - (sign in ")]}⦄")
        if depth == 0 and place + 1 < len(text):
            return None  # it ends before the text does, or there is none
    if depth or not re.search("[,;]", text):
        return None
    if text[0] in "{⦃":
        return "set"
    return "round" if text[0] == "(" and text[-1] == ")" else "square"


# --- percentages ----------------------------------------------------------------------------------


def _percentages(gold: str, answer: str, percent: bool) -> tuple[str, str]:
    pair = [gold, answer]
    values = [_PERCENT.sub("", text) for text in pair]
    signs = [value != text for value, text in zip(values, pair, strict=True)]
    if not any(signs) or not all(_NUMBER.fullmatch(value) for value in values):
        return gold, answer
    bare = values[signs.index(False)] if not all(signs) else ""
    if all(signs) or (percent and "/" not in bare and "frac" not in bare):
        return values[0], values[1]
    scaled = [rf"\frac{{{v}}}{{100}}" if s else v for v, s in zip(values, signs, strict=True)]
    return scaled[0], scaled[1]


# --- inequalities ---------------------------------------------------------------------------------


def _intervals(gold: str, answer: str) -> tuple[str, str]:
    """Inequalities as intervals, unless they are about different variables."""
    found = [_solved(text) for text in (gold, answer)]
    if found[0] and found[1] and found[0][0] != found[1][0]:
        return gold, answer
    compared = [_RELATION.search(_related(text)) is not None for text in (gold, answer)]
    if all(compared) and not all(found):
        return gold, answer  # one is not solved: as math-verify has it
    return (found[0][1] if found[0] else gold), (found[1][1] if found[1] else answer)


def _related(text: str) -> str:
    for sign, latex in _RELATIONS.items():
        text = re.sub(latex, sign, text)
    return text


def _solved(text: str) -> tuple[str, str] | None:
    """Variable and set, of inequalities that are solved for one variable."""
    pieces = [_conjunction(part) for part in _OR.split(_related(text))]
    if any(piece is None for piece in pieces):
        return None
    variables = {piece[0] for piece in pieces if piece}
    if len(variables) != 1:
        return None
    return variables.pop(), r"\cup ".join(piece[1] for piece in pieces if piece)


def _conjunction(text: str) -> tuple[str, str] | None:
    """One inequality, or two one-sided ones that bound the same variable from both sides."""
    parts = _AND.split(text)
    if len(parts) == 1:
        return _inequality(text)
    bounds = [_one_sided(part) for part in parts]
    if len(parts) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    (variable, first, low), (other, second, high) = bounds
    if variable != other or first[0] == second[0]:
        return None
    if first in "<≤":
        first, low, second, high = second, high, first, low
    return variable, _interval(low, first, second, high)


def _inequality(text: str) -> tuple[str, str] | None:
    sides = [side.strip() for side in _RELATION.split(text)]
    signs = _RELATION.findall(text)
    if len(signs) == 2 and _VARIABLE.fullmatch(sides[1]):
        low, variable, high = sides
        if all(sign in ">≥" for sign in signs):
            low, high, signs = high, low, [_TURNED[sign] for sign in reversed(signs)]
        if all(sign in "<≤" for sign in signs) and _is_bound(low) and _is_bound(high):
            return variable, _interval(low, _TURNED[signs[0]], signs[1], high)
        return None
    if len(signs) == 1 and signs[0] == "∈" and _VARIABLE.fullmatch(sides[0]):
        return sides[0], sides[1]
    found = _one_sided(text)
    if found is None:
        return None
    variable, sign, bound = found
    if sign == "≠":
        return variable, rf"(-\infty,{bound})\cup ({bound},\infty)"
    if sign in "<≤":
        return variable, _interval(r"-\infty", ">", sign, bound)
    return variable, _interval(bound, sign, "<", r"\infty")


def _one_sided(text: str) -> tuple[str, str, str] | None:
    """Variable, sign and bound of an inequality with a variable alone on one side."""
    signs = _RELATION.findall(text)
    if len(signs) != 1 or signs[0] == "∈":
        return None
    left, right = (side.strip() for side in text.split(signs[0]))
    if _VARIABLE.fullmatch(left) and _is_bound(right):
        return left, signs[0], right
    if _VARIABLE.fullmatch(right) and _is_bound(left):
        return right, _TURNED.get(signs[0], signs[0]), left
    return None


def _is_bound(text: str) -> bool:
    """Whether it may be an end of an interval: it has no list, and no free variable."""
    words = re.sub(r"\\(?:[dt]?frac|sqrt|pi|infty|ln|log|times|cdot)(?![a-z])", "", text)
    return bool(text) and "," not in text and not re.search("[a-zA-Z]", words)


def _interval(low: str, above: str, below: str, high: str) -> str:
    return f"{'[' if above == '≥' else '('}{low},{high}{']' if below == '≤' else ')'}"
