"""`kvcomp plan`: its bounds against tables worked out by hand."""

import dataclasses
import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")


import kvcomp
from kvcomp import METHODS, Delethink, Delta, LazyEviction, LouisKV, PerTokenRetrieval
from kvcomp.hf.shape import shape_of
from kvcomp.plan import plan
from kvcomp.testing.models import tiny_model
from plan_configs import CONFIGS, H200, QWEN3, R1_1B, R1_7B, agrees, make_shape

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shapes():
    return {name: make_shape(name) for name in CONFIGS}


# --- tables worked out by hand --------------------------------------------------------------------

WEIGHTS_READ = {QWEN3: "15.14", R1_7B: "14.14", R1_1B: "3.09"}  # GB
KIB_PER_TOKEN = {QWEN3: 144, R1_7B: 56, R1_1B: 28}

# On an H200 at 4.3 TB/s: tokens, batch, ms, % KV, DELTA, half of the KV, 2048 resident tokens,
# contexts of 6K on average, whether it fits.
STEP_TABLE = {
    QWEN3: """
        8K    1 3.80  7 1.06 1.04 1.06 1.02 yes
        8K   32 12.5 72 2.10 1.56 2.17 1.22 yes
        8K   64 21.5 84 2.56 1.72 2.68 1.26 yes
        32K   1 4.64 24 1.24 1.14 1.29 1.24 yes
        32K   8 12.5 72 2.38 1.56 3.06 2.40 yes
        32K  32 39.5 91 3.78 1.84 6.8  3.85 no
        128K  1 8.01 56 1.86 1.39 2.23 2.15 yes
        128K  8 39.5 91 4.05 1.84 9.7  7.6  no""",
    R1_7B: """
        8K   64 10.3 68 1.96 1.52 2.04 1.20 yes
        32K   1 3.73 12 1.10 1.06 1.12 1.11 yes
        32K   8 6.78 52 1.70 1.35 1.93 1.72 yes
        32K  64 31.3 89 3.47 1.81 6.2  3.66 yes
        128K  1 5.04 35 1.39 1.21 1.52 1.49 yes
        128K  8 17.3 81 2.94 1.68 4.9  4.4  yes""",
    R1_1B: """
        8K    1 0.77  7 1.05 1.04 1.06 1.02 yes
        8K   64 4.21 83 2.48 1.71 2.65 1.26 yes
        32K   1 0.94 23 1.23 1.13 1.28 1.23 yes
        32K   8 2.47 71 2.29 1.55 2.98 2.36 yes
        32K  64 14.7 95 4.11 1.91 9.2  4.40 yes
        128K  1 1.59 55 1.81 1.38 2.18 2.10 yes
        128K  8 7.71 91 3.83 1.83 9.3  7.4  yes""",
}
STEP_ROWS = [(name, *row.split()) for name in CONFIGS for row in STEP_TABLE[name].split("\n")[1:]]

# Averaged over a generation, batch 1, 16, 64: DELTA 18K and 32K, eviction to 8K, Delethink 32K.
GENERATION_TABLE = {
    R1_1B: ["1.06 1.73 2.63", "1.11 2.20 3.32", "1.08 1.66 2.04", "1.10 1.87 2.48"],
    R1_7B: ["1.03 1.38 2.07", "1.05 1.66 2.66", "1.04 1.41 1.84", "1.04 1.51 2.14"],
    QWEN3: ["1.07 1.78 2.72", "1.12 2.28 3.48", "1.08 1.68 2.05", "1.10 1.90 2.49"],
}


def delta_of(name):
    """As in the tables: 6 of 36 layers attend densely, 5 of 28 as published."""
    return Delta(delta_layers=(2, 11, 18, 28)) if name == QWEN3 else Delta.published(name)


def methods_of(name, tokens):
    """What the columns of the table mean, in each method's own terms."""
    half = LazyEviction(budget=tokens // 2 - 64, window=128)  # from 64 below half to 64 above
    louis = LouisKV(dense_layers=0, sinks=16, local=256, budget=2048 - 16 - 256)
    return [delta_of(name), half, louis, Delethink()]


def test_weights_and_kv(shapes):
    for name, shape in shapes.items():
        assert agrees(shape.weights_read(1) / 1e9, WEIGHTS_READ[name])
        assert shape.kv_per_token == KIB_PER_TOKEN[name] * 1024
        assert shape.weights > shape.weights_read(64)  # the embedding is looked up


@pytest.mark.parametrize("row", STEP_ROWS, ids=" ".join)
def test_step_table(shapes, row):
    name, thousands, batch, ms, share, *ceilings, fits = row
    tokens = int(thousands.removesuffix("K")) * 1024
    found = plan(shapes[name], H200, methods_of(name, tokens), context=tokens, batch=int(batch))
    assert agrees(found.floor_ms, ms)
    assert agrees(100 * found.kv_share, share)
    dense, *others = found.rows
    assert (dense.method, dense.speedup) == ("full", 1)
    for method, printed in zip(others, ceilings, strict=True):
        assert agrees(method.speedup, printed), method.method
    # 7B at 64 x 32K fits by a hair: 15.2 GB of weights and 120.3 GB of KV. That is within 135 GiB;
    # within 135 GB it would be without the embedding only.
    assert found.fits == (fits == "yes")


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_table(shapes, name):
    cases = [
        (delta_of(name), 18 * 1024),
        (delta_of(name), 32 * 1024),
        (LazyEviction(budget=8 * 1024 - 64), 32 * 1024),
        (Delethink(), 32 * 1024),
    ]
    for (method, tokens), printed in zip(cases, GENERATION_TABLE[name], strict=True):
        for batch, figure in zip((1, 16, 64), printed.split(), strict=True):
            found = plan(shapes[name], H200, [method], context=tokens, batch=batch, generate=tokens)
            assert agrees(found.rows[1].speedup_generation, figure), (method, batch)


def test_generation_is_the_sum_of_its_steps(shapes):
    prompt, count, shape = 3000, 1000, shapes[R1_1B]
    methods = [Delta(budget=3200), LazyEviction(budget=3000, keep_prompt=True)]
    options = {"batch": 64, "prompt": prompt}
    steps = [
        plan(shape, H200, methods, context=prompt + new, **options).rows
        for new in range(1, count + 1)
    ]
    dense, *others = (sum(row.floor_ms for row in rows) for rows in zip(*steps, strict=True))
    found = plan(shape, H200, methods, context=prompt + count, generate=count, **options)
    for row, floor in zip(found.rows[1:], others, strict=True):
        assert row.speedup_generation == pytest.approx(dense / floor, rel=1e-3)
        assert 1 < row.speedup_generation < row.speedup


def test_scoring_link_and_encoding(shapes):
    """Logits in fp16 are 3.1, 4.7 and 5.5 % of the KV at 4, 6 and 7 heads a group; 2048 tokens of
    Qwen3-8B are 302 MB and 5.5 ms of a link; a carry of 4K is 62 TFLOP."""
    for name, percent in ((QWEN3, 3.125), (R1_1B, 4.6875), (R1_7B, 5.46875)):
        step = METHODS["tova"]().step_bytes(shapes[name].place(30_000, 0))
        assert 100 * step.scoring / step.read == pytest.approx(percent)
    retrieval = PerTokenRetrieval(budget=2048, dense_layers=0)
    found = plan(shapes[QWEN3], H200, [retrieval, Delethink(head=0)], context=32768)
    _, retrieval, delethink = found.rows
    assert agrees(retrieval.link_bytes / 1e6, "302") and agrees(retrieval.link_ms, "5.5")
    assert delethink.encoded == 1
    assert agrees(delethink.encode_ms * H200.flops / 1e15 * 4096, "62")
    assert retrieval.kv_host == found.kv_per_sequence
    unknown = dataclasses.replace(H200, link=None, flops=None)
    found = plan(shapes[QWEN3], unknown, [LouisKV(), Delethink()], context=32768)
    assert found.rows[1].link_bytes > 0 and found.rows[1].link_ms is None
    assert found.rows[2].encoded > 0 and found.rows[2].encode_ms is None


def test_eight_bits_are_compared_with_dense_attention_of_the_model(shapes):
    """A row of 128 values is 260 bytes instead of 512, in host memory 272."""
    shape, size = shapes[QWEN3], {"context": 32768, "batch": 8}
    wide, eight = (plan(shape, H200, [LouisKV()], **size, kv=kv) for kv in ("model", "int8"))
    assert eight.kv_total * 512 == wide.kv_total * 260
    full, louis = eight.rows
    assert full.kv_read == eight.kv_total and full.speedup == wide.floor_ms / eight.floor_ms > 1
    assert louis.kv_host * 512 == wide.rows[1].kv_host * 272
    assert louis.link_bytes * 512 == pytest.approx(wide.rows[1].link_bytes * 272)
    with pytest.raises(ValueError, match="kv: expected one of model, int8, got 'int4'"):
        plan(shape, H200, **size, kv="int4")
    latents = dataclasses.replace(shape, value_dim=0)
    with pytest.raises(ValueError, match="kv: expected 'model' for Qwen3-8B, which caches latents"):
        plan(latents, H200, **size, kv="int8")


def test_tied_embeddings_are_read():
    shape, tied = (make_shape(R1_1B, tie_word_embeddings=tie) for tie in (False, True))
    assert tied.weights < shape.weights
    assert tied.weights_read(1) == tied.weights == shape.weights_read(1)


def test_experts_are_read_as_tokens_take_them():
    shape = shape_of(tiny_model("qwen3_moe").config)
    assert (shape.experts, shape.active) == (4, 2)
    assert shape.weights_read(1) == shape.fixed + shape.routed / 2
    assert shape.weights_read(2) == shape.fixed + shape.routed * 3 / 4
    assert shape.weights_read(500) == pytest.approx(shape.fixed + shape.routed)
    assert shape.parameters == (shape.fixed + shape.routed / 2) / 2


# --- what fits ------------------------------------------------------------------------------------


def test_what_fits_is_the_most_that_does(shapes):
    shape, small = shapes[R1_7B], dataclasses.replace(H200, memory=40e9)
    batch, tokens = 4, 30_000
    methods = [Delta(), LouisKV(), LazyEviction(), Delethink()]
    found = plan(shape, small, methods, context=tokens, batch=batch)
    room = small.memory - shape.weights
    for row in found.rows:
        assert row.sequences * row.kv_held <= room < (row.sequences + 1) * row.kv_held
    full, delta, louis, lazy, delethink = found.rows
    assert full.longest == delta.longest == int(room // (batch * shape.kv_per_token))
    assert full.longest < louis.longest < full.longest * 32  # its digests grow, a 32nd of K and V
    assert lazy.longest is None and delethink.longest is None
    assert full.sequences == delta.sequences < louis.sequences < lazy.sequences
    seconds = shape.weights_read(1) + full.sequences * full.kv_held
    assert full.tokens_per_second == pytest.approx(full.sequences / seconds * small.bandwidth)

    at_limit = plan(shape, small, context=full.longest, batch=batch)
    past_it = plan(shape, small, context=full.longest + 1, batch=batch)
    assert at_limit.fits and not past_it.fits

    tiny = dataclasses.replace(H200, memory=1e9)
    row = plan(shape, tiny, context=tokens).rows[0]
    assert (row.sequences, row.longest, row.tokens_per_second) == (0, 0, 0)


def test_only_full_attention_layers_are_compressed():
    config = tiny_model("olmo3", max_position_embeddings=8192).config
    config.sliding_window = 1000
    shape = shape_of(config)
    assert shape.layers == 3 and shape.windows == (1000, 1000, 1000)
    method = LazyEviction(budget=200, window=2)
    size = shape.place(1, 0).token_bytes
    dense, lazy = plan(shape, H200, [method], context=4000, batch=7).rows
    assert dense.kv_read == 7 * 3 * (4000 + 1000) * size
    assert lazy.kv_read == 7 * 3 * (201.5 + 1000) * size
    assert lazy.kv_held == 3 * (202 + 1000) * size
    assert lazy.attended == 201.5
    short = plan(shape, H200, [method], context=150).rows
    assert short[0].kv_read == short[1].kv_read == 6 * 150 * size


# --- the library call -----------------------------------------------------------------------------


def test_it_needs_no_transformers(shapes):
    fields = dataclasses.asdict(shapes[QWEN3])
    code = (
        "import sys, json; sys.modules['transformers'] = None\n"
        "from kvcomp import Delta, plan; import kvcomp.plan\n"
        f"shape = plan.Shape(**{fields!r})\n"
        "found = plan.plan(shape, plan.DEVICES['h200'], [Delta()], context=32768, batch=16)\n"
        "print(json.dumps(found.to_dict(), allow_nan=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    here = plan(shapes[QWEN3], H200, [Delta()], context=32768, batch=16)
    assert json.loads(done.stdout) == json.loads(json.dumps(here.to_dict()))


def test_a_method_that_says_nothing_is_dense(shapes):
    class Plain(kvcomp.Method):
        name = "plain"

    dense, plain = plan(shapes[R1_1B], H200, [Plain()], context=5000).rows
    assert (plain.kv_read, plain.kv_held, plain.speedup) == (dense.kv_read, dense.kv_held, 1)
