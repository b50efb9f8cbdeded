"""Which layers of a vLLM model the backend takes, and which stay with vLLM."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from kvcomp.engines.vllm import VERSIONS, check
from kvcomp.engines.vllm.settings import Settings, SinkWindow

has_vllm = importlib.util.find_spec("vllm") is not None
in_engine = pytest.mark.skipif(not has_vllm, reason=f"vLLM {VERSIONS} is not installed here")
ASKED = {"additional_config": {"kvcomp": {"method": "full"}}}


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
def test_pieces_behind_a_cut_attend_to_what_is_left():
    """Of 40 tokens in pages of 4, in the second row tokens 8 to 23 are gone."""
    from kvcomp.engines.vllm.prompts import Lost, PromptPlanner

    metadata = SimpleNamespace(
        seq_lens=torch.tensor([9, 10, 40], dtype=torch.int32),
        block_table=torch.arange(60, dtype=torch.int32).view(3, 20),
        query_start_loc=torch.tensor([0, 1, 6, 11], dtype=torch.int32),
    )
    planner = PromptPlanner(4, 2, 64, torch.float32)
    plan = planner.plan(metadata, 1, 1, 10, 4, Lost(8, torch.tensor([0, 16])))
    assert plan.seq_lens.tolist() == [10, 24] and plan.seq_lens.dtype == torch.int32
    second = [*range(160, 168), *range(184, 200)]
    assert plan.sources.tolist() == [*range(80, 90), *second]
    assert plan.slots.tolist() == [*range(10), *range(128, 152)]
    assert plan.query_start_loc.tolist() == [0, 5, 10]
