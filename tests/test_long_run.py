"""Long runs of the bundled reasoner: memory is flat where it should be, positions do not drift, and
no Python objects pile up.

A step of the reasoner takes milliseconds, so here each method decodes some thousand tokens. With
KVCOMP_LONG_RUN=100000 in the environment, each decodes that many; that takes hours.
"""

import dataclasses
import importlib
import json
import os

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

import kvcomp
import kvcomp.reasoner
from kvcomp.methods import LazyEviction

pytestmark = pytest.mark.usefixtures("one_thread")

bench = importlib.import_module("bench_long_run")
teacher_forcing, verdict = bench.teacher_forcing, bench.verdict
FirstLayer = teacher_forcing.FirstLayer

TOKENS = {
    "full": 3_000,
    "delta": 3_000,
    "lazy-eviction": 8_000,
    "louis-kv": 4_000,
    "delethink": 8_000,
}
TOKEN_BYTES = 8 * 2 * 2 * 64 * 2  # layers, K and V, heads x size, bf16
BEFORE = 101  # tokens of the prompt


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(kvcomp.reasoner.path()).eval()


def run(model, method, tokens, looks=40):
    prompt, stream = bench.text(tokens)
    assert len(prompt) == BEFORE and len(stream) == tokens
    log = teacher_forcing.decode(
        model, method, prompt, stream, every=tokens // looks, checks=looks // 4
    )
    return log.rows()


def faults(method, rows):
    return list(verdict.faults(method, BEFORE, TOKEN_BYTES, rows))


@pytest.mark.parametrize("name", bench.NAMES)
def test_nothing_drifts_and_nothing_piles_up(model, name):
    method = bench.method_of(name, 256)
    tokens = int(os.environ.get("KVCOMP_LONG_RUN", TOKENS[name]))
    rows = run(model, method, tokens)
    assert faults(method, rows) == []
    checked, last = [row for row in rows if row["rows"]], rows[-1]
    assert len(checked) == 4 and checked[-1] is last
    if name in ("full", "delta"):
        assert last["rows"] == 2 * (BEFORE + tokens)  # of two heads
        assert last["held"] == (BEFORE + tokens) * TOKEN_BYTES <= last["reserved"]
    else:
        assert last["kept"] <= 256 + BEFORE and last["reserved"] == rows[20]["reserved"]
    if name == "louis-kv":  # pool and device
        assert last["rows"] > 2 * (BEFORE + tokens - method.segment[1]) and last["notes"] > 0
        assert last["host"] >= (BEFORE + tokens - method.segment[1]) * TOKEN_BYTES
    else:
        assert last["host"] == 0
    if name == "delethink":  # its positions are those that the model was trained with
        assert sum(row["foreseen"] for row in rows) / len(rows) > 0.98


@pytest.fixture(scope="module")
def notes(model):
    """Of a short run of a method that evicts."""
    return run(model, bench.method_of("lazy-eviction", 128), 400)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"seen": 700}, "has seen"),
        ({"drift": 1}, "off by 1"),
        ({"error": 0.02}, "off by 2.0%"),
        ({"shifted": 0.01}, "could not be told"),
        ({"kept": 134}, "may be held"),
        ({"held": 134 * TOKEN_BYTES}, "may be held"),
        ({"reserved": 257 * TOKEN_BYTES}, "reserved"),
        ({"host": 1}, "host memory"),
        ({"tensors": 10**7}, "neither K and V nor notes"),
        ({"objects": 10**6}, "objects more"),
        ({"blocks": 10**8}, "blocks more"),
    ],
)
def test_what_is_wrong_is_said(notes, change, fault):
    method = bench.method_of("lazy-eviction", 128)
    assert faults(method, notes) == []
    found = faults(method, [*notes[:-1], notes[-1] | change])
    assert fault in found[0]


def test_tensors_that_grow_are_found(notes):
    method = bench.method_of("lazy-eviction", 128)
    rows = [row | {"tensors": row["tensors"] + 8 * row["tokens"]} for row in notes]
    assert any("tensors have grown" in fault for fault in faults(method, rows))


def test_full_must_hold_every_token(model):
    rows = run(model, kvcomp.Full(), 80, looks=8)
    assert faults(kvcomp.Full(), rows) == []
    rows[-1]["held"] -= TOKEN_BYTES
    assert "should be" in faults(kvcomp.Full(), rows)[0]


def test_positions_that_drift_are_found(model):
    """A model that, from some token on, is told to rotate by one position too many."""
    steps = 0

    def further(module, args, given):
        nonlocal steps
        steps += 1
        x, positions = *args, *given.values()
        return (x, positions + (steps > 50)), {}

    rotary = model.get_decoder().rotary_emb
    hook = rotary.register_forward_pre_hook(further, with_kwargs=True)
    try:
        found = faults(kvcomp.Full(), run(model, kvcomp.Full(), 80, looks=8))
    finally:
        hook.remove()
    assert any("positions are off by 1" in fault for fault in found)


@dataclasses.dataclass(frozen=True)
class Hoarding(LazyEviction):
    """Keeps what it sees, outside of the cache."""

    hoard: list = dataclasses.field(default_factory=list)

    def end_step(self, cache):
        super().end_step(cache)
        self.hoard.append({"step": cache.steps, "lens": cache.layers[0].seq_lens.clone()})


def test_a_method_that_hoards_is_found(model):
    method = Hoarding(budget=96, window=32, alpha=0.2)
    found = faults(method, run(model, method, 400))
    for what in ("tensors have grown", "objects more", "blocks more"):
        assert any(what in fault for fault in found)


def test_one_row_at_a_wrong_place_is_found(model):
    prompt, stream = bench.text(60)
    reference, method = FirstLayer(model, prompt), bench.method_of("lazy-eviction", 128)
    with torch.inference_mode(), kvcomp.patch(model, method) as run:
        cache = run.new_cache()
        model(prompt[None], past_key_values=cache)
        for token in stream:
            model(token.view(1, 1), past_key_values=cache)
        layer, text = cache.kv.layers[0], torch.cat([prompt, stream])
        assert reference.compare(cache.kv, text, method).right
        layer.keys[0, 1, 7] = layer.keys[0, 1, 8]
        wrong = reference.compare(cache.kv, text, method)
    assert not wrong.right and wrong.error > 0.1


def test_methods_run_one_by_one_make_one_file(tmp_path, capsys):
    path = tmp_path / "long-run.json"
    for name in ("delta", "delethink", "delta"):
        assert bench.main(["--smoke", "--method", name, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert list(content["meta"]["methods"]) == ["delethink", "delta"]
    assert {(r["method"], r["tokens"]) for r in content["rows"]} == {
        (name, tokens) for name in ("delta", "delethink") for tokens in (100, 200)
    }
    assert "rows right to" in capsys.readouterr().out
