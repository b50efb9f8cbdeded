"""The vLLM backend for GPUs, as far as a CPU goes: vLLM's own classes and metadata, CPU tensors.

It has never run on a GPU. Decode steps run here on the CPU kernels, through the same class; for
prompts it is tested that vLLM's kernel is given the right rows.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import kvcomp
from kvcomp.cache import KVCache
from kvcomp.engines.vllm import BACKENDS, VERSIONS
from kvcomp.engines.vllm.settings import Settings
from kvcomp.ops import OPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason=f"vLLM {VERSIONS} is not installed here"
)

PAGE, LAYERS, HEADS, KV_HEADS, SIZE, LONGEST = 16, 6, 4, 2, 64, 1024
DELTA = {"method": "delta", "budget": 64, "page_size": PAGE, "recent": 2, "delta_layers": [2, 4]}


@pytest.fixture
def on_gpu(monkeypatch):
    """vLLM's platform as it is on a GPU, in what the plugin asks of it."""
    import vllm.platforms
    from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES

    importlib.import_module("kvcomp.engines.vllm.cuda")  # what it imports asks more of a platform
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, check_and_update_config=lambda config: None
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    before = dict(_ATTN_OVERRIDES)
    yield platform
    _ATTN_OVERRIDES.clear()
    _ATTN_OVERRIDES.update(before)


def config(given, **changes):
    """The parts of a vLLM configuration that are looked at before the start."""
    found = SimpleNamespace(
        additional_config={"kvcomp": given},
        backend_per_kind={},
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        speculative_config=None,
        lora_config=None,
        use_mla=False,
        is_attention_free=False,
        block_size=128,
        cache_dtype="auto",
        enable_prefix_caching=False,
    )
    vars(found).update(changes)
    found.parallel_config = found.cache_config = found.model_config = found.attention_config = found
    return found


def test_layers_with_full_attention_get_the_backend(on_gpu):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvcomp.engines.vllm import register
    from kvcomp.engines.vllm.cuda import KvcompBackend

    register()
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKENDS["cuda"][1]
    assert AttentionBackendEnum.CUSTOM.get_class() is KvcompBackend
    assert KvcompBackend.get_name() == "CUSTOM"
    asked = config(DELTA)
    on_gpu.check_and_update_config(asked)
    assert asked.backend_per_kind == {"full_attention": AttentionBackendEnum.CUSTOM}
    other = config(DELTA, backend_per_kind={"full_attention": AttentionBackendEnum.FLASH_ATTN})
    with pytest.raises(ValueError, match=r"full_attention layers: expected CUSTOM.*FLASH_ATTN"):
        on_gpu.check_and_update_config(other)
    dense = config(DELTA, additional_config={})
    on_gpu.check_and_update_config(dense)
    assert dense.backend_per_kind == {}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"method": "lazy-eviction"}, "runs on CPUs only; on GPUs: expected full or delta"),
        ({"method": "sink-window"}, "runs on CPUs only"),
        ({"method": "full", "page_size": 8}, "page_size: expected a multiple of 16.*got 8"),
    ],
)
def test_what_a_gpu_cannot_have_stops_the_start(on_gpu, given, reason):
    from kvcomp.engines.vllm import register

    register()
    with pytest.raises(ValueError, match=reason):
        on_gpu.check_and_update_config(config(given))


def test_a_build_without_kernels_for_gpus_stops_the_start(on_gpu, monkeypatch):
    from kvcomp.engines.vllm import register

    register()
    monkeypatch.setitem(OPS["attend_and_select"].bound, "cuda", "reference")
    with pytest.raises(ValueError, match="attend_and_select has neither a CUDA nor a Triton"):
        on_gpu.check_and_update_config(config(DELTA))


@pytest.fixture
def backend(monkeypatch):
    """A builder and impls as in a worker: real layers of vLLM, in a real configuration of it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvcomp import reasoner
    from kvcomp.engines.vllm import check, cuda

    check()
    args = EngineArgs(
        str(reasoner.path()),
        max_model_len=LONGEST,
        max_num_seqs=4,
        additional_config={"kvcomp": DELTA},
    )
    options = args.create_engine_config()
    shape = {"num_heads": HEADS, "head_size": SIZE, "scale": 0.2, "num_kv_heads": KV_HEADS}
    names = [f"layers.{index}.attn" for index in range(LAYERS)]
    with set_current_vllm_config(options):
        layers = [
            Attention(**shape, cache_config=options.cache_config, prefix=name) for name in names
        ]
        for layer in layers:
            layer.impl = cuda.KvcompImpl(
                *(HEADS, SIZE, 0.2, KV_HEADS, None, None, "auto"), attn_type="decoder"
            )
        assert cuda.KvcompBackend.get_supported_kernel_block_sizes() == [PAGE]
        spec = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32
        )
        builder = cuda.KvcompBuilder(spec, names, options, torch.device("cpu"))
        yield builder, layers


def batch_of(lens, queries, table, bound):
    """vLLM's metadata of rows with so many tokens, of which the last `queries` are new."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        num_reqs=len(lens),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=bound,
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        is_prefilling=torch.tensor([count > 1 for count in queries]),
    )


@pytest.mark.parametrize("order", ["NPHC", "NHPC"], ids=["tokens-first", "heads-first"])
@pytest.mark.parametrize("bound", [90, LONGEST], ids=["eager", "graph"])
def test_delta_over_vllms_cache(backend, monkeypatch, bound, order):
    """Rows of a mixed batch over a table as wide as the longest request, beside a kvcomp cache."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    builder, layers = backend
    lens, queries = [90, 61, 40], [1, 1, 7]
    width = LONGEST // PAGE + 3  # vLLM rounds it up
    table = torch.full((len(lens), width), 1 << 30, dtype=torch.int32)  # junk behind the end
    pages = [-(-length // PAGE) for length in lens]
    ids = torch.randperm(sum(pages)).int()
    for row, part in enumerate(ids.split(pages)):
        table[row, : pages[row]] = part
    metadata = builder.build(0, batch_of(lens, queries, table, bound))
    assert metadata.num_decodes == 2 and metadata.step.longest == bound
    method = kvcomp.Delta(budget=64, page_size=PAGE, recent=2, delta_layers=(2, 4))
    mine, seen = KVCache(method, LAYERS), []

    def prompts(self, layer, query, key, value, cache, rows, output, *scales):
        seen.append((rows.query_start_loc.tolist(), rows.seq_lens.tolist(), rows.num_actual_tokens))
        assert torch.equal(rows.block_table, table[2:]) and len(query) == len(output) == 7
        output.fill_(7.0)
        return output

    monkeypatch.setattr(TritonAttentionImpl, "forward", prompts)
    valid = torch.arange(90) < torch.tensor(lens[:2])[:, None]
    for index, layer in enumerate(layers):
        sizes = {"N": sum(pages), "P": PAGE, "H": KV_HEADS, "C": 2 * SIZE}
        cache = torch.randn([sizes[x] for x in order]).permute([order.index(x) for x in "NHPC"])
        kv = torch.randn(2, 2, KV_HEADS, 90, SIZE)
        for row in range(2):
            for token in range(lens[row]):
                place = cache[table[row, token // PAGE], :, token % PAGE]
                place.copy_(torch.cat([*kv[:, row, :, token]], -1))
        query = torch.randn(sum(queries), HEADS, SIZE)
        output = torch.full_like(query, torch.nan)
        new = torch.randn(sum(queries), KV_HEADS, SIZE)
        layer.impl.forward(layer, query, new, new, cache, metadata, output)
        mine.layers[index].append(*kv, valid)
        expected = mine.attend(mine.layers[index], query[:2], 0.2)
        torch.testing.assert_close(output[:2], expected)
        assert (output[2:] == 7).all()
    assert seen == [([0, 7], [40], 7)] * LAYERS


def test_buffers_have_their_place_before_the_first_step(backend):
    """A captured graph reads and writes the same memory in every replay."""
    from vllm.v1.attention.backend import AttentionCGSupport

    builder, _ = backend
    assert builder._cudagraph_support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.logits.shape == (4, HEADS, LONGEST)
    table = torch.zeros(3, LONGEST // PAGE, dtype=torch.int32)
    batch = batch_of([5, 9, 0], [1, 1, 1], table, LONGEST)
    first, second = (builder.build_for_cudagraph_capture(batch).step for _ in range(2))
    assert first.logits.data_ptr() == second.logits.data_ptr() == builder.logits.data_ptr()
    assert first.table.data_ptr() == table.data_ptr() and first.table.shape == table.shape
    assert first.lens.data_ptr() == batch.seq_lens.data_ptr() and first.longest == LONGEST


def test_layers_of_another_kind_stay_with_vllm(backend, monkeypatch):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from kvcomp.engines.vllm.cuda import KvcompImpl

    seen = []
    monkeypatch.setattr(TritonAttentionImpl, "forward", lambda self, *args: seen.append(args))
    windowed = KvcompImpl(HEADS, SIZE, 0.2, KV_HEADS, None, 128, "auto")
    capped = KvcompImpl(HEADS, SIZE, 0.2, KV_HEADS, None, None, "auto", 30.0)
    wide = KvcompImpl(HEADS, 112, 0.2, KV_HEADS, None, None, "auto")
    builder, layers = backend
    metadata = builder.build(0, batch_of([5], [1], torch.zeros(1, 8, dtype=torch.int32), 5))
    for impl in windowed, capped, wide:
        assert not impl.managed
        impl.forward(layers[0], *(torch.zeros(1) for _ in range(4)), metadata, torch.zeros(1))
    assert [args[5] for args in seen] == [metadata] * 3
    assert metadata.seq_lens.tolist() == [5]  # of the whole batch


def test_the_backend_without_a_method_says_so(monkeypatch):
    from kvcomp.engines.vllm import cuda, placing

    monkeypatch.setattr(placing, "_asked", None)
    with pytest.raises(ValueError, match="CUSTOM: expected a method in the 'kvcomp' key"):
        cuda.KvcompBackend.get_impl_cls()
    assert Settings.KEY == "kvcomp"
