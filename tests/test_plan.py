"""`kvcomp plan`: its bounds against tables worked out by hand, and against what a run counts."""

import dataclasses
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_sharing import SHARING
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import every_model
import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV, PerTokenRetrieval, cli
from kvcomp.cache import KVCache
from kvcomp.cache.rows import EightBits
from kvcomp.hf.shape import shape_of
from kvcomp.methods.cost import Place
from kvcomp.methods.eviction import Eviction, ObservingEviction
from kvcomp.methods.retrieval import Retrieval
from kvcomp.plan import DEVICES, plan
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

H200 = DEVICES["h200"]
CONFIGS = {
    "Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
QWEN3, R1_7B, R1_1B = CONFIGS


def make_shape(name, **changes):
    fields = {**CONFIGS[name], **changes}
    return shape_of(AutoConfig.for_model(fields.pop("model_type"), **fields), name=name)


@pytest.fixture(scope="module")
def shapes():
    return {name: make_shape(name) for name in CONFIGS}


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[QWEN3]))
    return file


@pytest.fixture
def call(capsys):
    def run(*args):
        code = cli.main(["plan", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def agrees(value, printed):
    """Within the rounding of what is printed, and half a per cent."""
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-decimals + 0.005 * value


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


# --- the command ----------------------------------------------------------------------------------


def test_command_prints_every_method(call, config_file):
    code, out, _ = call(config_file, "--batch", 64, "--context", 8192, "--device", "h200")
    assert code == 0
    for word in ("16.4 GB", "15.1 GB", "144 KiB", "h200", "21.5 ms", "84%", "batch 64 fits"):
        assert word in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, method in METHODS.items():
        assert (name in lines) == (not method.baseline or name == "full")
    assert "2.6" in lines["delta"] and "135 tokens" not in out
    code, out, _ = call(config_file, "--method", "all", "--device", "h200", "--memory", 10)
    assert code == 0 and all(name in out for name in METHODS)
    assert "does not fit, nor do the weights alone" in out


def test_its_page_shows_what_it_prints(call, tmp_path):
    """The table, and what is said about a batch of one, by the command that stands above them."""
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text()
    command = re.search(r"^kvcomp plan Qwen/Qwen3-8B (.*)$", page, flags=re.MULTILINE).group(1)
    table = page.partition("| tokens attended | step, at least |")[2].partition("\n\n")[0]
    shown = {line.split()[1].strip("`"): line.split("|")[2:-1] for line in table.splitlines()[2:]}
    folder = tmp_path / QWEN3
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[QWEN3]))
    found = json.loads(call(folder, *command.split(), "--json")[1])
    assert set(shown) == {row["method"] for row in found["rows"]}
    for row in found["rows"]:
        attended, ms, speedup, sequences = (cell.strip() for cell in shown[row["method"]])
        assert attended == f"{row['attended']:.0f}" and ms == f"{row['floor_ms']:.3g} ms"
        assert speedup == f"{row['speedup']:.2f}x" and sequences == str(row["sequences"])
    alone = json.loads(call(folder, "--device", "h200", "--method", "all", "--json")[1])
    best, percent = re.search(r"can give there is (\S+)x: (\d+) %", page).groups()
    assert agrees(max(row["speedup"] for row in alone["rows"]), best)
    assert agrees(100 * (1 - alone["kv_share"]), percent)


def test_command_json(call, config_file):
    code, out, _ = call(
        *(config_file, "--json", "--bandwidth", 1000, "--memory", 20, "--batch", 2),
        *("--context", 4096, "--prompt-tokens", 96, "--generate", 4000, "--dtype", "float16"),
    )
    assert code == 0
    found = json.loads(out)
    assert found["model"]["dtype"] == "float16" and found["model"]["layers"] == 36
    assert found["device"]["bandwidth"] == 1e12 and found["device"]["memory"] == 2e10
    assert (found["context"], found["batch"], found["prompt"]) == (4096, 2, 96)
    assert found["kv_total"] == 2 * 4096 * found["kv_per_token"]
    assert found["floor_ms"] == pytest.approx((found["weights_read"] + found["kv_total"]) / 1e9)
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"full", *(name for name in METHODS if not METHODS[name].baseline)}
    assert rows["lazy-eviction"]["longest"] is None
    for row in rows.values():
        assert row["speedup_generation"] >= 1 and row["parameters"]


def test_command_gives_each_method_its_options(call, config_file):
    code, out, _ = call(
        *(config_file, "--json", "--device", "h200", "--budget", 2048, "--chunk", 1024),
        *("--set", "page_size=32", "--set", "lazy-eviction.window=64", "--set", "window=512"),
    )
    assert code == 0
    rows = {row["method"]: row["parameters"] for row in json.loads(out)["rows"]}
    assert "budget=2048, page_size=32" in rows["delta"]
    assert "budget=2048, window=64" in rows["lazy-eviction"]
    assert "window=512" in rows["louis-kv"]
    assert "chunk=1024, carry=512" in rows["delethink"]
    code, out, _ = call(
        *(config_file, "--json", "--device", "h200", "--method", "delethink", "--inner", "delta"),
        *("--budget", 512, "--set", "inner.recent=4", "--set", "head=10"),
    )
    assert code == 0
    (row,) = json.loads(out)["rows"][1:]
    for part in ("head=10", "Delta(budget=512, page_size=8, recent=4"):
        assert part in row["parameters"]


def test_command_knows_published_layers(call, tmp_path):
    folder = tmp_path / R1_7B
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[R1_7B]))
    for model in (folder, folder / "config.json"):
        _, out, _ = call(model, "--json", "--device", "h200", "--method", "delta")
        found = json.loads(out)
        assert found["model"]["name"] == R1_7B
        assert "delta_layers=(2, 14, 22)" in found["rows"][1]["parameters"]


def test_command_measures_this_machine(call):
    code, out, _ = call("reasoner", "--device", "cpu", "--context", 512, "--json")
    found = json.loads(out)
    assert code == 0 and found["device"]["name"] == "cpu"
    assert found["device"]["bandwidth"] > 1e8 and found["device"]["memory"] > 1e8
    assert found["device"]["source"].startswith("measured: read")
    assert found["fits"]


def test_command_takes_the_size_of_quantized_weights(call, config_file):
    fields = {**CONFIGS[QWEN3], "quantization_config": {"quant_method": "awq", "bits": 4}}
    config_file.write_text(json.dumps(fields))
    code, out, err = call(config_file, "--device", "h200")
    assert code == 2 and "quantized" in err and "--weights" in err
    code, out, _ = call(config_file, "--device", "h200", "--weights", 5, "--json")
    model = json.loads(out)["model"]
    assert code == 0 and model["weights"] == 5e9
    assert model["fixed"] / model["weights"] == pytest.approx(15.136 / 16.381, rel=1e-3)
    assert agrees(model["parameters"] / 1e9, "7.57")


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
