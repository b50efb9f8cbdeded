"""Every type of causal LM of transformers: exact under every method, or refused with a reason, or a
model that stock transformers itself cannot run in a tiny size. Nothing else.

`--write-matrix` writes the table in docs/models.md that all runs compare with.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import every_model
import kvcomp
import model_tables
from padded import COVERING, IDS, MASK, generate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        version.parse(transformers.__version__) < version.parse("5.23"),
        reason="the table is of the transformers that the project is built on",
    ),
]

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "every model: made by tests/test_every_model.py"
STEPS = 6
ROUGH = {"zamba2": 1e-2}  # roundings in its norms grow to 4e-3 in stock transformers, too
FAILS = "stock transformers fails"
OUTCOMES = {}


def decode(model):
    """Tokens [2, STEPS] and their scores [2, STEPS, V]."""
    ids = IDS * MASK
    out = generate(
        model, ids, max_new_tokens=STEPS, output_scores=True, return_dict_in_generate=True
    )
    return out.sequences, torch.stack(out.scores, 1)


def outcome_of(kind):
    try:
        model = every_model.tiny(AutoModelForCausalLM, kind)
        tokens, scores = decode(model)
        assert bool(scores.isfinite().all())
    except Exception as raised:
        error = raised.__cause__ or raised
        said = next(line for line in str(error).splitlines() if line.strip())
        return f"{FAILS}: {type(error).__name__}: {said.strip()}".replace("|", "/")
    reasons = {}
    for name, method in COVERING.items():
        try:
            with kvcomp.patch(model, method) as run:
                out = decode(model)
        except ValueError as error:
            reasons[name] = reason_of(error)
            continue
        assert torch.equal(out[0], tokens), f"{kind}: other tokens under {name}"
        close = ROUGH.get(kind, 2e-3)
        torch.testing.assert_close(out[1], scores, rtol=close, atol=close, msg=f"{kind}, {name}")
        assert run.report().tokens_decoded == 2 * (STEPS - 1)
    again = decode(model)
    assert torch.equal(again[0], tokens), f"{kind}: undo left something behind"
    if not reasons:
        return model_tables.EXACT
    if reasons.keys() == COVERING.keys() and len(set(reasons.values())) == 1:
        return f"refused: {reasons['full']}"
    said = "; ".join(f"`{name}`: {reason}" for name, reason in reasons.items())
    return f"refused in part, else exact: {said}"


def reason_of(error):
    """Without the names of classes, which every type has of its own."""
    text = re.sub(r"^kvcomp(\.\w+)?: (model: )?", "", str(error))
    text = re.sub(
        r"\b[A-Z]\w*(Config|LM|Model|LMHead|Attention\w*|Generation|Decoder)\b", "…", text
    )
    return text.replace("|", "/")


@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_model_is_exact_or_refused(kind, request):
    OUTCOMES[kind] = outcome_of(kind)
    if not request.config.getoption("--write-matrix"):
        assert committed()[kind] == OUTCOMES[kind]


def test_the_table_has_every_type(request):
    if request.config.getoption("--write-matrix"):
        assert OUTCOMES.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys(), "some failed"
        model_tables.write(PAGE, table(), MARK)
    assert committed().keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


def table():
    """A line for each outcome, the exact ones first and stock's failures last."""
    order = sorted(set(OUTCOMES.values()), key=lambda x: (x != model_tables.EXACT, FAILS in x, x))
    lines = ["| outcome | types | |", "|---|---|---|"]
    for outcome in order:
        kinds = sorted(kind for kind, found in OUTCOMES.items() if found == outcome)
        lines.append(model_tables.row(outcome, str(len(kinds)), ", ".join(kinds)))
    return "\n".join(lines)


def committed():
    found = {}
    for line in model_tables.read(PAGE, MARK).splitlines()[2:]:
        outcome, _, kinds = (part.strip() for part in line.strip("|").split("|"))
        found |= dict.fromkeys(kinds.split(", "), outcome)
    return found
