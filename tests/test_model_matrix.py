"""Every architecture under every method: padded batches, two turns and beams, or a refusal.

A cell holds when its tokens are those of stock `generate` under a budget that covers the context,
and when a small budget gives what another way to the same answer gives. What the cells found is
the table of docs/models.md, which `pytest tests/test_model_matrix.py --write-matrix` writes.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version

import kvcomp
import model_tables
from kvcomp import METHODS, Delethink, Full
from kvcomp.testing.models import ARCHITECTURES, tiny_model
from slow import delethink as slow_delethink

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_outputs")

ROOT = Path(__file__).parents[1]
COVERING, SMALL = 256, 8  # budgets: over and under the tokens of every context here
WIDTH, PAD, STEPS, BEAMS = 24, 9, 7, 3
NEVER = 128  # an EOS that no tiny model knows: delethink wants to know one

OLD = version.parse(transformers.__version__) < version.parse("5.17")
KINDS = [kind for kind in ARCHITECTURES if not (OLD and kind in model_tables.NEW)]
NAMES = ["full", *(name for name, method in METHODS.items() if not method.baseline)]

# (architecture, method, case), each or None for any of them -> the reason that a refusal gives
REASONS = {}
if OLD:
    REASONS["qwen3_next", None, None] = "requires its own cache class"
    REASONS["deepseek_v3", None, None] = "before they are cached"
REASONS[None, "delethink", "two turns"] = "a second turn cannot continue from this cache"
REASONS[None, "delethink", "beams"] = "delethink has no beam search"
OUTCOMES: dict[tuple[str, str, str], str] = {}  # what the cells of this run found


@functools.cache
def model_of(kind):
    """Five layers at most, four of them full, so that every method has something to leave out."""
    layers = ARCHITECTURES[kind].get("layer_types")
    if layers is None:
        return tiny_model(kind)
    types = ["full_attention", layers[0], *["full_attention"] * 3]
    return tiny_model(kind, num_hidden_layers=5, layer_types=types)


@functools.cache
def stock_of(kind, case):
    return CASES[case](model_of(kind))


def padded_batch():
    """Two rows of WIDTH columns, PAD of them padding in the first."""
    ids = torch.randint(3, 128, (2, WIDTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :PAD] = mask[0, :PAD] = 0
    return {"input_ids": ids, "attention_mask": mask}


def second_prompt():
    return torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(2))


def generate(model, batch, **options):
    given = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": NEVER, **options}
    return model.generate(**batch, **given)


def answer_batch(model):
    return generate(model, padded_batch())


def answer_twice(model):
    """Both turns of a conversation on one cache; its positions are the tokens of the first."""
    batch = padded_batch()
    first = generate(model, batch, return_dict_in_generate=True)
    cache, ids = first.past_key_values, torch.cat([first.sequences, second_prompt()], 1)
    assert cache.get_seq_length() == WIDTH + STEPS - 1
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - WIDTH), value=1)
    return generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)


def search(model, **options):
    return generate(model, padded_batch(), num_beams=BEAMS, num_return_sequences=BEAMS, **options)


CASES = {"padded batch": answer_batch, "two turns": answer_twice, "beams": search}


# --- the same answers by another way --------------------------------------------------------------


class ByHand:
    """Rows without padding, by forwards that name the position of every token."""

    def __init__(self, model, run):
        self.model, self.cache, self.seen = model, run.new_cache(), 0

    def feed(self, ids):
        """Log-probabilities [B, V] of the token that follows."""
        positions = torch.arange(self.seen, self.seen + ids.shape[1]).expand(len(ids), -1)
        self.seen += ids.shape[1]
        with torch.no_grad():
            out = self.model(ids, position_ids=positions, past_key_values=self.cache)
        return out.logits[:, -1].log_softmax(-1)

    def answer(self, prompt):
        """The prompt and its greedy answer [B, n]; the last token has not come in."""
        ids = prompt
        for _ in range(STEPS):
            ids = torch.cat([ids, self.feed(prompt).argmax(-1, keepdim=True)], 1)
            prompt = ids[:, -1:]
        return ids

    def score(self, prompt, answers):
        """Mean log-probability of every token of the answers [B, n], one prompt [1, n]."""
        found, ids, total = prompt.expand(len(answers), -1), answers.split(1, 1), 0
        for token in ids:
            total = total + self.feed(found).gather(1, token)
            found = token
        return total[:, 0] / len(ids)


def alone():
    """The padded row, without its padding."""
    return padded_batch()["input_ids"][:1, PAD:]


def check_padded_batch(model, method):
    if isinstance(method, Delethink):  # the paper's loop around the model's own `generate`
        respond = slow_delethink.stock(model, do_sample=False, eos_token_id=NEVER)
        want = torch.cat([alone(), slow_delethink.think(method, alone(), respond, STEPS)], 1)
    else:
        with kvcomp.patch(model, method) as run:
            want = ByHand(model, run).answer(alone())
    with kvcomp.patch(model, method) as run:
        assert torch.equal(answer_batch(model)[:1, PAD:], want)
    return run


def check_two_turns(model, method):
    with kvcomp.patch(model, method) as run:
        hand = ByHand(model, run)
        first = hand.answer(alone())
        rest = hand.answer(torch.cat([first[:, -1:], second_prompt()[:1]], 1))
        assert torch.equal(answer_twice(model)[:1, PAD:], torch.cat([first[:, :-1], rest], 1))
    return run


def check_beams(model, method):
    """A beam ends with the score that its tokens have by themselves, in a cache of their own."""
    with kvcomp.patch(model, method) as run:
        found = search(model, return_dict_in_generate=True, output_scores=True)
        hand = ByHand(model, run).score(alone(), found.sequences[:BEAMS, WIDTH:])
    torch.testing.assert_close(found.sequences_scores[:BEAMS], hand, rtol=1e-4, atol=1e-4)
    return run


CHECKS = {"padded batch": check_padded_batch, "two turns": check_two_turns, "beams": check_beams}


# --- the cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind, name, case):
    model, stock = model_of(kind), stock_of(kind, case)
    reasons = [why for key, why in REASONS.items() if fits(key, (kind, name, case))]
    outcome = refused(model, name, case, reasons[0]) if reasons else exact(model, name, case, stock)
    if case == "padded batch":
        assert torch.equal(answer_batch(model), stock), "undo left something behind"
    OUTCOMES[kind, name, case] = outcome


def fits(key, cell):
    return all(part is None or part == own for part, own in zip(key, cell, strict=True))


def exact(model, name, case, stock):
    """The method changes nothing where its budget covers all, and what it should where not."""
    assert stock[:, WIDTH:].unique().numel() > 4, "the model is degenerate"
    with kvcomp.patch(model, METHODS[name].example(COVERING)) as run:
        assert torch.equal(CASES[case](model), stock)
    assert run.report().attended_ratio == pytest.approx(1)
    if name != "full":
        report = CHECKS[case](model, METHODS[name].example(SMALL)).report()
        assert report.attended_ratio < 1, "the small budget covers the context"
    return model_tables.EXACT


def refused(model, name, case, reason):
    """One error, whose words the table has."""
    with (
        pytest.raises(ValueError, match=reason) as error,
        kvcomp.patch(model, METHODS[name].example(COVERING)),
    ):
        CASES[case](model)
    return re.sub(r"^kvcomp(\.\w+)?: ", "", str(error.value))


def test_small_budgets_are_felt():
    """They would show nothing if the tokens were the same with and without."""
    model, stock = model_of("llama"), stock_of("llama", "padded batch")
    for name in NAMES[1:]:
        with kvcomp.patch(model, METHODS[name].example(SMALL)):
            assert not torch.equal(answer_batch(model), stock), name


def test_full_is_dense():
    assert METHODS["full"].example(SMALL) == Full()


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.skipif(OLD, reason="the table is of the transformers that the project is built on")
def test_the_table_is_what_the_cells_found(request):
    classes = {kind: type(model_of(kind)).__name__ for kind in KINDS}
    cells = [(kind, name, case) for kind in KINDS for name in NAMES for case in CASES]
    page = ROOT / "docs" / "models.md"
    if request.config.getoption("--write-matrix"):
        assert set(OUTCOMES) == set(cells), "cells failed or did not run; nothing is written"
        model_tables.write(page, model_tables.whole(OUTCOMES, classes))
    committed = model_tables.parse(page)
    assert set(committed) == set(cells)
    for cell, outcome in OUTCOMES.items():
        assert committed[cell] == outcome, cell
    assert model_tables.read(page) == model_tables.whole(committed, classes)
