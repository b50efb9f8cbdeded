#!/usr/bin/env bash
# lm-eval 0.4.13, task gsm8k_cot_self_consistency, whose maj@8 and maj@64 are self-consistency: the answer that
# most of the sampled chains give.
#   * A chain without an answer votes too. The regex filter gives it the answer "[invalid]", and majority_vote
#     counts that like any other. So a question is lost where more chains were cut off, or worded their
#     answer differently, than agree on the right number, even if all others agree: long chains of thought
#     under a token limit lose votes twice. A tie goes to whichever came first, "[invalid]" included.
#   * Votes are compared as texts, grading is not: it removes commas, so 1,000 and 1000 are both right, but
#     for the vote they are two answers, and 900 wins over either.
# kvcomp: kvcomp/thinking/votes.py counts only rows that have an answer.
#
# Seen: of 8 chains, 5 cut off and 3 for 18: [invalid]. 3 for 900, 2 for 1,000 and 3 for 1000: 900.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps lm-eval==0.4.13 pyyaml==6.0.3  # all that its filters need
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import re
from importlib.metadata import version
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.filters import build_filter_ensemble

print("lm-eval", version("lm-eval"))
folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
task = yaml.safe_load((folder / "gsm8k-cot-self-consistency.yaml").read_text())
base = yaml.safe_load((folder / task["include"]).read_text())
steps = next(entry["filter"] for entry in task["filter_list"] if entry["name"] == "maj@8")
print("filters of maj@8:", ", ".join(step["function"] for step in steps))
metric = next(entry for entry in base["metric_list"] if entry["metric"] == "exact_match")


def elected(chains: list[str]) -> str:
    components = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in steps]
    instance = Instance(request_type="generate_until", doc={}, arguments=("", {}), idx=0)
    instance.resps = chains
    build_filter_ensemble("maj@8", components).apply([instance])
    return instance.filtered_resps["maj@8"]


def graded(answer: str) -> str:
    """What exact_match compares, by the task's own list of what it ignores."""
    for pattern in metric["regexes_to_ignore"]:
        answer = re.sub(pattern, "", answer)
    return answer


def answers(*numbers: str) -> list[str]:
    return [f"So it is {number}. The answer is {number}." for number in numbers]


CUT = "She has 16 eggs and eats three, so 13 are left. Then"
FOUND = [  # chains, what is elected, what a vote among the answers elects
    ("5 cut off, 3 for 18", [CUT] * 5 + answers(*["18"] * 3), "[invalid]", "18"),
    ("4 cut off, 4 for 18", [CUT] * 4 + answers(*["18"] * 4), "[invalid]", "18"),
    ("4 for 18, 4 cut off", answers(*["18"] * 4) + [CUT] * 4, "18", "18"),
    ("3 for 900, 2 for 1,000, 3 for 1000", answers(*["900"] * 3, *["1,000"] * 2, *["1000"] * 3), "900", "1000"),
]
changed = 0
for name, chains, found, expected in FOUND:
    vote = graded(elected(chains))
    changed += vote != found
    print(f"{'as found' if vote == found else 'CHANGED '}  {name}: {vote}, and among the answers {expected}")
assert graded("1,000") == graded("1000"), "changed: grading"
raise SystemExit(1 if changed else 0)
PYTHON
