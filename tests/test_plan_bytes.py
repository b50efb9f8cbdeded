"""The bytes of `kvcomp plan` are those that a run counts and that real caches hold."""

import dataclasses
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_sharing import SHARING
from transformers import AutoModelForCausalLM, DynamicCache

import every_model
import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LouisKV
from kvcomp.cache import KVCache
from kvcomp.cache.rows import EightBits
from kvcomp.hf.shape import shape_of
from kvcomp.methods.cost import Place
from kvcomp.methods.eviction import Eviction, ObservingEviction
from kvcomp.methods.retrieval import Retrieval
from kvcomp.plan import DEVICES, plan
from kvcomp.testing.models import tiny_model
from plan_configs import H200

pytestmark = pytest.mark.usefixtures("one_thread")


# --- formulas against counts ----------------------------------------------------------------------

LAYERS, HEADS, KV_HEADS, DIM = 6, 4, 2, 32
INV_FREQ = 10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
ATTENDING = [METHODS[name].example(64) for name in METHODS if name != "delethink"]


ATTENDING += [
    dataclasses.replace(method, **options)
    for method in ATTENDING
    if isinstance(method, Eviction)
    for options in ({"unit": "query_head"}, {"keep_prompt": not method.keep_prompt})
    if not (method.moves_keys and "keep_prompt" in options)  # which must not stay where it is
]


RUNS = [(method, 40) for method in ATTENDING]
CODED = [(method, 40) for method in ATTENDING if not isinstance(method, Eviction)]


CODED += [(METHODS[name].example(64), 100) for name in ("lazy-eviction", "h2o")]


RUNS += [(method, 100) for method in ATTENDING if isinstance(method, Eviction)]  # over the budget


RUNS = [(*run, None) for run in RUNS] + [(*run, EightBits(True)) for run in CODED]


@pytest.mark.parametrize("method, prompt, eight_bits", RUNS, ids=str)
def test_formula_is_what_a_cache_counts(method, prompt, eight_bits):
    """Over whole periods of every method: what its steps read, and what it held at most."""
    steps = 128
    cache = KVCache(method, LAYERS, inv_freq=INV_FREQ, eight_bits=eight_bits)
    heads = {"k": KV_HEADS, "v": KV_HEADS, "q": HEADS}
    counted = [0]  # bytes read up to each step
    for step in range(steps + 1):
        count = 1 if step else prompt
        for layer in cache.layers:
            k, v, q = (torch.randn(1, heads[x], count, DIM) for x in "kvq")
            layer.append(k, v)
            if step:
                cache.attend(layer, q[:, :, 0], DIM**-0.5)
            else:
                cache.prefill(layer, q, DIM**-0.5)
        meter = cache.meter
        if step:
            tokens = zip(meter.read_tokens, meter.slot_bytes, strict=True)
            counted.append(sum(int(n) * b for n, b in tokens))
    places = [
        Place(prompt + step, prompt, LAYERS, HEADS, KV_HEADS, DIM, 4, coded=eight_bits is not None)
        for step in range(1, steps + 1)
    ]
    formulas = [method.step_bytes(place) for place in places]
    read, held = sum(f.read for f in formulas), max(f.held for f in formulas)
    if isinstance(method, Retrieval):  # how many local tokens there are depends on the queries
        assert counted[-1] == pytest.approx(read, rel=0.05)
        assert meter.peak_bytes <= held
        fetched = sum(int(n) * b for n, b in zip(meter.fetched_rows, meter.row_bytes, strict=True))
        at_most = sum(f.link for f in formulas) / method.selection_rate
        assert 0 < fetched <= at_most
        if not isinstance(method, LouisKV):  # whose rate is the text's
            rate = max(int(count) for count in meter.retrievals) / steps
            assert rate == pytest.approx(method.selection_rate, rel=0.1)
    else:
        assert counted[-1] == pytest.approx(read, rel=0.005)
        assert meter.peak_bytes == held
        if method.croppable:  # nothing to average over: each step by itself
            assert [b - a for a, b in pairwise(counted)] == [f.read for f in formulas]
    if isinstance(method, ObservingEviction):
        assert formulas[-1].scoring > 0


def test_delethink_is_the_mean_of_its_contexts():
    method = Delethink(chunk=64, carry=32, head=4, max_chunks=None)
    place = Place(200, 20, LAYERS, HEADS, KV_HEADS, DIM, 4)
    size = LAYERS * place.token_bytes
    step = method.step_bytes(place)
    assert step.read == pytest.approx((20 + 48) * size)
    assert step.held == (20 + 64) * size
    assert step.encoded == 28 / 32
    first = method.step_bytes(dataclasses.replace(place, seen=20 + 63))
    assert (first.read, first.held, first.encoded) == (83 * size, 83 * size, 0)
    paper = dataclasses.replace(method, variant="paper").step_bytes(place)
    assert paper.read == pytest.approx((20 + 4 + 48) * size) and paper.encoded == 1
    streaming = dataclasses.replace(method, reset="streaming").step_bytes(place)
    assert streaming.held == (20 + 64 + 20 + 32) * size
    assert dataclasses.replace(method, reset="rotate").step_bytes(place).encoded == 0
    inner = Delta(budget=16, page_size=4, recent=2, delta_layers=(2,))
    nested = dataclasses.replace(method, inner=inner).step_bytes(place)
    assert nested.held == step.held
    assert nested.read == pytest.approx(((20 + 48) * 3 + 16 * 3) * place.token_bytes, rel=0.05)
    assert nested.scoring > 0


@pytest.mark.parametrize(
    "kind, fields", [("falcon_h1", {}), ("zaya", {}), ("gemma4_text", SHARING)]
)
def test_layers_that_share_or_hold_states_too(kind, fields):
    """The K and V of a cache that exists, against the plan from its config."""
    model = every_model.tiny(AutoModelForCausalLM, kind, **fields)
    shape = shape_of(model.config, dtype="float32")
    with kvcomp.patch(model, Full()) as run, torch.no_grad():
        model(torch.randint(3, 100, (2, 40)), past_key_values=run.new_cache())
    assert run.report().kv_bytes_kept == 2 * 40 * shape.kv_per_token > 0


@pytest.mark.parametrize("kv", ["model", "int8"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "olmo3", "qwen3_next"])
def test_bytes_of_a_real_model(kind, kv):
    """Weights and KV of a model that exists, against the plan from its config."""
    model = tiny_model(kind)
    shape = shape_of(model.config, dtype="float32")
    assert shape.weights == sum(parameter.nbytes for parameter in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    experts = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    assert shape.routed == experts
    assert shape.fixed == pytest.approx(sum(m.weight.nbytes for m in linear), rel=0.03)
    ids, new = torch.randint(3, 100, (2, 40)), 9
    with kvcomp.patch(model, Full(), kv=kv) as run:
        cache = model.generate(
            ids, max_new_tokens=new + 1, do_sample=False, return_dict_in_generate=True
        ).past_key_values
    report = run.report()
    found = plan(shape, H200, context=40 + new, batch=2, kv=kv)
    assert report.kv_bytes_kept == 2 * (40 + new) * found.kv_per_token
    assert report.kv_bytes_dense == 2 * (40 + new) * shape.kv_per_token
    sliding = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    assert len(sliding) == len(shape.windows) == 3 * (kind == "olmo3")
    assert shape.linear == 3 * (kind == "qwen3_next")
    # A sliding layer stores a token less than it attends to: the newest comes on top.
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in sliding)
    window = 16
    assert found.kv_total == report.kv_bytes_kept + stored * window / (window - 1)


# --- layers that share, and layers of several sizes


def cached(model, tokens):
    """Bytes of K and V that transformers' own cache holds, of full layers and of sliding ones."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
    held = {False: 0, True: 0}
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            held[layer.is_sliding] += layer.keys.nbytes + layer.values.nbytes
    return held[False], held[True]


SHARING = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", *["full_attention"] * 3] * 2,
    "num_kv_shared_layers": 4,
}
LINEAR = {"falcon_h1": 4, "zamba2": 5, "granitemoehybrid": 1}  # layers with states, K and V or not


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma4_text", SHARING),
        *((kind, {}) for kind in (*LINEAR, "gemma3_text", "gemma2", "mimo_v2_flash")),
    ],
)
def test_bytes_are_those_of_a_real_cache(kind, more):
    model = every_model.tiny(AutoModelForCausalLM, kind, **more)
    shape = shape_of(model.config, dtype="float32")
    full, sliding = cached(model, 40)
    assert shape.kv_per_token * 40 == full
    assert shape.sliding_bytes(15) == sliding  # a window less the token that comes next
    dense = plan(shape, DEVICES["h100"], context=40).rows[0]
    assert dense.kv_held == full + shape.sliding_bytes(40)
    if more:
        assert (shape.layers, shape.shared, shape.shared_windows) == (3, 3, (16,))
        assert dense.kv_read == 2 * dense.kv_held, "each of four layers has one that reads it again"
    else:
        assert dense.kv_read == dense.kv_held
    assert shape.linear == LINEAR.get(kind, 0)
