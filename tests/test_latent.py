"""Latent attention (MLA): absorbed queries find what expanded keys and values would give."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import Mistral4Config, Mistral4ForCausalLM

import kvcomp
from kvcomp import METHODS, Delta, Full, LazyEviction, LouisKV, StreamingLLM
from kvcomp.cache import KVCache
from kvcomp.cache.latent import LatentLayer
from kvcomp.hf.shape import shape_of
from kvcomp.testing.models import COMMON, LATENT, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_outputs")

STEPS = 14
SMALL = [
    Full(),
    Delta(budget=12, page_size=4, recent=2, warmup=1, delta_layers=(1, 2)),
    LazyEviction.example(16),
    METHODS["raas"].example(16),
    METHODS["recency-window"].example(16),
    METHODS["quest"].example(14),
]


def name_of(method):
    return method.name


def batch(width=21, pad=6):
    ids = torch.randint(3, 128, (2, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :pad] = mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, given, **options):
    return model.generate(**given, **{"max_new_tokens": STEPS, "do_sample": False, **options})


def mistral4():
    """Its text class is not among those of AutoModelForCausalLM; its queries are scaled."""
    sizes = {**COMMON, **LATENT["glm4_moe_lite"], "head_dim": 48}
    torch.manual_seed(0)
    model = Mistral4ForCausalLM(Mistral4Config(**sizes)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("kind", [*LATENT, "mistral4"])
def test_every_architecture_generates_as_it_does_itself(kind):
    model = mistral4() if kind == "mistral4" else tiny_model(kind)
    stock = generate(model, batch())
    assert stock[:, 21:].unique().numel() > 8, "the model is degenerate"
    for method in (Full(), Delta.example(256), LazyEviction.example(256)):
        with kvcomp.patch(model, method) as run:
            assert torch.equal(generate(model, batch()), stock), method
        assert run.report().tokens_decoded == 2 * (STEPS - 1)
    assert torch.equal(generate(model, batch()), stock), "undo left something behind"


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prefill_chunk_size": 5}, {"num_return_sequences": 2, "num_beams": 2}],
    ids=lambda options: "-".join(options),
)
def test_ways_to_generate(options):
    model = tiny_model("deepseek_v3")
    stock = generate(model, batch(), **options)
    with kvcomp.patch(model, Full()):
        assert torch.equal(generate(model, batch(), **options), stock)
    with torch.no_grad():  # without a cache
        want = model(**batch(), use_cache=False).logits
        with kvcomp.patch(model, Full()):
            got = model(**batch(), use_cache=False).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Spy:
    """Which tokens every layer reads in every decode step, of one sequence."""

    def __init__(self, monkeypatch):
        self.read: dict[int, list[list[int]]] = {}
        attend = LatentLayer.attend

        def watched(layer, q, scale, **read):
            lens = read.get("seq_lens", layer.seq_lens)
            slots = torch.arange(layer.max_len)
            if "page_ids" in read:
                pages, size = read["page_ids"][0, 0], read["page_size"]
                pages = pages[pages >= 0].long()
                slots = (pages[:, None] * size + torch.arange(size)).flatten()
            tokens = layer.positions(1)[0, 0][slots[: int(lens[0])]]
            self.read.setdefault(layer.position, []).append(tokens.tolist())
            return attend(layer, q, scale, **read)

        monkeypatch.setattr(LatentLayer, "attend", watched)

    def mask(self, layer, prompt, total):
        """[1, 1, total, total] fp32: a prompt is causal, a step sees what was read in it."""
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        for step, tokens in enumerate(self.read[layer]):
            seen[prompt + step] = False
            seen[prompt + step, tokens] = True
        return torch.zeros(1, 1, total, total).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("method", SMALL, ids=name_of)
def test_a_small_budget_is_expanded_attention_over_the_tokens_it_reads(method, monkeypatch):
    """The stock model, all tokens at once, each layer with a mask of what was read there."""
    model = tiny_model("deepseek_v3")
    ids = batch()["input_ids"][1:]
    spy = Spy(monkeypatch)
    with kvcomp.patch(model, method) as run:
        out = generate(model, {"input_ids": ids}, output_logits=True, return_dict_in_generate=True)
    if not isinstance(method, Full):
        assert run.report().attended_ratio < 1
    prompt, total = ids.shape[1], out.sequences.shape[1] - 1

    def masked(module, args, given):
        given["attention_mask"] = spy.mask(module.layer_idx, prompt, total)
        return args, given

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    with torch.no_grad():
        want = model(out.sequences[:, :-1], use_cache=False).logits[:, prompt - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotated", [16, 32])
def test_units_in_host_memory_are_of_whole_rows(rotated):
    """Of clusters and of closed segments alike, the digest is the mean of the rows in the pool."""
    model = tiny_model("deepseek_v3", qk_rope_head_dim=rotated, head_dim=rotated)
    rank_and_rotated = model.config.kv_lora_rank + rotated
    with kvcomp.patch(model, LouisKV.example(24)) as run:
        cache = run.new_cache()
        generate(model, batch(), past_key_values=cache)
        layers = [layer for layer in cache.kv.layers if layer.is_hosted]
        assert layers
        for layer in layers:
            index, pool = layer.hosted.index, layer.hosted.pool
            assert pool.nbytes == 2 * rank_and_rotated * 4 * pool.capacity
            for row, units in enumerate(index.num_units.tolist()):
                starts = index.starts[row, 0].tolist()
                assert starts[units] > 21 - 6, "no segment of the output is closed"
                for unit, (begin, end) in enumerate(pairwise(starts[: units + 1])):
                    if begin < end:
                        want = pool.read(row, begin, end)[0].mean(-2)
                        torch.testing.assert_close(index.digests[row, :, unit], want)


def test_a_layer_keeps_one_row_a_token():
    """At DeepSeek-V3's sizes: 576 elements, where 128 heads would take 128 * (192 + 128)."""
    cache = KVCache(Full(), 2, rank=512)
    for layer in cache.layers:
        latents, rotated = torch.randn(2, 1, 5, 512), torch.randn(2, 1, 5, 64)
        layer.append(latents.bfloat16(), rotated.bfloat16())
        assert layer.token_bytes == 576 * 2
        assert torch.equal(layer.keys, torch.cat([latents, rotated], -1).bfloat16())
        assert layer.values.data_ptr() == layer.keys.data_ptr()
        assert torch.equal(layer.values, latents.bfloat16())
    cache.meter.observe(cache)
    assert cache.meter.peak_bytes == 2 * 2 * 5 * 576 * 2


def test_the_report_counts_latents():
    model = tiny_model("deepseek_v2")
    with kvcomp.patch(model, Full()) as run:
        generate(model, batch())
    row = LATENT["deepseek_v2"]["kv_lora_rank"] + LATENT["deepseek_v2"]["qk_rope_head_dim"]
    report = run.report()
    assert report.kv_bytes_kept == 4 * (2 * (21 + STEPS - 1) - 6) * row * 4


@pytest.mark.parametrize("kind", ["deepseek_v2", "kimi_linear"])
def test_a_plan_counts_the_bytes_of_a_real_cache(kind):
    model = tiny_model(kind)
    shape = shape_of(model.config, dtype="float32")
    with kvcomp.patch(model, Full()) as run, torch.no_grad():
        model(batch()["input_ids"], past_key_values=run.new_cache())
    assert shape.kv_per_token * 2 * 21 == run.report().kv_bytes_kept
    at = shape.place(40, 21)
    assert Full().step_bytes(at).held == 40 * shape.kv_per_token


@pytest.mark.parametrize("method", [one for one in SMALL if one.static], ids=name_of)
def test_a_static_cache_gives_the_tokens_of_the_dynamic_one(method):
    """Two turns of padded rows; a slot is a latent and a rotated key."""
    model = tiny_model("deepseek_v3")
    options = {"max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True}
    with kvcomp.patch(model, method) as run:
        want = generate(model, batch(), **options)
        figures = run.report()
    with kvcomp.patch(model, method, max_tokens=64) as run:
        for _ in range(2):
            got = generate(model, batch(), **options)
            assert torch.equal(got.sequences, want.sequences)
            torch.testing.assert_close(got.logits, want.logits)
    report = run.report()
    assert report.evictions == 2 * figures.evictions
    assert (report.kept_peak, report.attended_ratio) == (figures.kept_peak, figures.attended_ratio)
    row = 4 * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    assert run.meter.slot_bytes == [row] * len(model.model.layers)


def test_what_needs_more_than_latents_is_refused():
    model = tiny_model("deepseek_v3")
    with pytest.raises(ValueError, match="moves keys to other positions"):
        kvcomp.patch(model, StreamingLLM(budget=24))
    with (
        kvcomp.patch(model, LazyEviction(budget=24, window=7, alpha=0.02, unit="query_head")),
        pytest.raises(ValueError, match="use another unit than 'query_head'"),
    ):
        generate(model, batch())


@pytest.mark.parametrize("rank, rotated", [(24, 8), (16, 8), (1024, 16)])
def test_rows_that_attention_is_not_compiled_for_are_refused(rank, rotated):
    model = tiny_model("deepseek_v3", kv_lora_rank=rank, qk_rope_head_dim=rotated, head_dim=rotated)
    with pytest.raises(
        ValueError, match=f"latents of {rank} columns and rotated keys of {rotated}"
    ):
        kvcomp.patch(model, LouisKV.example(24))
    generate(model, batch(), max_new_tokens=2)  # as it was


class Quantized(nn.Module):
    """A projection whose weights nothing can be absorbed from."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_projection_that_cannot_be_absorbed_is_refused():
    model = tiny_model("deepseek_v3")
    attention = model.model.layers[2].self_attn
    attention.kv_b_proj = Quantized(attention.kv_b_proj)
    with pytest.raises(ValueError, match=r"layer 2 expands its latents .* by Quantized"):
        kvcomp.patch(model, Full())
    assert "expand_kv" not in vars(attention)


def hooked(projection):
    projection.register_forward_hook(lambda module, given, out: 1.5 * out)


def pre_hooked(projection):
    projection.register_forward_pre_hook(lambda module, given: (1.5 * given[0],))


def replaced(projection):
    projection.forward = lambda x: 1.5 * nn.functional.linear(x, projection.weight)


def offloaded(projection):
    """Its weight is on the meta device between its calls."""
    pytest.importorskip("accelerate").cpu_offload(projection, torch.device("cpu"))


@pytest.mark.parametrize("change", [hooked, pre_hooked, replaced, offloaded])
def test_a_projection_that_does_more_than_its_weight_is_refused(change):
    model = tiny_model("deepseek_v3")
    change(model.model.layers[1].self_attn.kv_b_proj)
    with pytest.raises(ValueError, match=r"layer 1 expands its latents .* hooks"):
        kvcomp.patch(model, Full())
    for layer in model.model.layers:
        assert "expand_kv" not in vars(layer.self_attn)


def test_a_projection_on_another_device_of_accelerate_is_absorbed():
    """`device_map="auto"` over several devices gives each layer such a hook."""
    model = tiny_model("deepseek_v3")
    stock = generate(model, batch())
    hooks = pytest.importorskip("accelerate.hooks")
    hook = hooks.AlignDevicesHook("cpu")
    hooks.add_hook_to_module(model.model.layers[1].self_attn.kv_b_proj, hook)
    with kvcomp.patch(model, Full()):
        assert torch.equal(generate(model, batch()), stock)


def test_an_adapter_that_comes_in_a_run_is_refused():
    """Absorbed steps would go on without it."""
    peft = pytest.importorskip("peft")
    model = tiny_model("deepseek_v3")
    stock = generate(model, batch())
    with kvcomp.patch(model, Full()):
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv_b_proj"]))
        with pytest.raises(ValueError, match=r"layer 0 expands its latents .*merge adapters"):
            generate(tuned, batch())
        tuned.unload()
        assert torch.equal(generate(model, batch()), stock)


def test_shapes_that_fit_no_latent_are_named():
    layer = KVCache(Full(), 1, rank=32).layers[0]
    with pytest.raises(ValueError, match=r"expected latents \[B, 1, n, 32\].*got \[2, 1, 5, 16\]"):
        layer.append(torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 16))
    layer.append(torch.randn(2, 1, 5, 32), torch.randn(2, 1, 5, 16))
    with pytest.raises(ValueError, match="append: head size: the cache has 48, got 56"):
        layer.append(torch.randn(2, 1, 5, 32), torch.randn(2, 1, 5, 24))
