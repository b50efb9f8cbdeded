"""Models that do something else than their layers say are followed, or refused with a reason."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MllamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import kvcomp
from guarded import GO, IDS, WHOLE, every_kind, generate, name_of
from kvcomp import Delethink, Delta, Full, LazyEviction
from kvcomp.testing.models import COMMON, tiny_model
from slow import delethink as slow_delethink

# --- models that encode everything anew at a length

SHORT, LONG = [1.0] * 16, [1.0 + 0.5 * i for i in range(16)]
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def phi3():
    return tiny_model(
        "phi3",
        hidden_size=128,
        original_max_position_embeddings=32,
        rope_parameters=dict(ROPES["longrope"]),
    )


def dynamic_llama():
    return tiny_model("llama", max_position_embeddings=24, rope_parameters=dict(ROPES["dynamic"]))


@pytest.mark.parametrize("prompt", [5, 40], ids=["crosses", "begins behind"])
@every_kind
def test_longrope_crosses_its_length(method, max_tokens, prompt):
    ids = torch.randint(3, 128, (2, prompt), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    go = {"attention_mask": mask, "do_sample": False, "eos_token_id": 1000, "max_new_tokens": 50}
    want = phi3().generate(ids, **go)
    model = phi3()
    with kvcomp.patch(model, method, max_tokens=max_tokens):
        assert torch.equal(model.generate(ids, **go), want)


@pytest.mark.parametrize("make", [phi3, dynamic_llama])
@pytest.mark.parametrize(
    ("chunk", "carry", "head", "question"),
    [(9, 4, 1, 5), (16, 6, 2, 20), (30, 10, 0, 5), (20, 12, 3, 17)],
)
def test_delethink_where_keys_depend_on_the_length(make, chunk, carry, head, question):
    """Contexts below, across and above the length at which the model's rotation changes."""
    if make is dynamic_llama and question + chunk >= 24:
        pytest.skip("contexts longer than the model knows are refused")
    ids = torch.randint(3, 128, (2, question), generator=torch.Generator().manual_seed(3))
    method = Delethink(chunk, carry, head=head, max_chunks=None)
    go = {"do_sample": False, "eos_token_id": 1000}
    want = slow_delethink.think(method, ids, slow_delethink.stock(make(), **go), 70)
    model = make()
    with kvcomp.patch(model, method) as run:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=70, **go)
    assert torch.equal(out[:, question:], want)
    assert run.report().kept_peak <= question + chunk
    assert run.report().boundaries > 0


@pytest.mark.parametrize("keep_prompt", [True, False])
def test_an_evicting_method_begins_anew_with_the_prompt_it_had(keep_prompt):
    """What the model encodes anew is the whole trace, which is no prompt to be kept for good."""
    method = LazyEviction(budget=12, window=4, alpha=0.05, keep_prompt=keep_prompt)
    model = phi3()
    with kvcomp.patch(model, method) as run:
        model.generate(IDS[:, :5], do_sample=False, eos_token_id=1000, max_new_tokens=60)
    report = run.report(layers=True)
    assert all(layer["kept_tokens"] <= 2 * (12 + 4) for layer in report.layers)
    assert report.kept_peak <= 33 + 4  # of the trace when it came in anew


# --- models that do something else than attend to what their cache layers keep


def random_model(kind, **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**COMMON, **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            noise = torch.randn_like(x)
            x.copy_(noise * 1.6 / x.shape[-1] ** 0.5 if x.ndim > 1 else x + 0.2 * noise)
    return model


def mllama():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {**COMMON, "hidden_size": 128, "num_hidden_layers": 6, "rope_parameters": rope}
    return MllamaForCausalLM(MllamaTextConfig(**sizes, cross_attention_layers=[2, 4])).eval()


VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
SPARSE = ["full_attention", "minimax_m3_sparse"] * 2
OTHERS = {
    "doge": (lambda: random_model("doge"), "makes an attention mask of its own"),
    "git": (lambda: random_model("git", vision_config=VISION), "its attention was not kvcomp's"),
    "mllama": (mllama, "leaves out layers in some of its forwards"),
    "minimax m3": (
        lambda: random_model("minimax_m3_vl_text", layer_types=SPARSE),
        "attend in a way of their own.*MiniMaxM3VLSparseCacheLayer",
    ),
    "mamba": (lambda: random_model("mamba", state_size=8), "no full-attention layer to manage"),
    "falcon mamba": (lambda: random_model("falcon_mamba", state_size=8), "no full-attention layer"),
    "rwkv": (lambda: random_model("rwkv"), "requires its own cache class"),
    "sliding": (lambda: random_model("phi3", sliding_window=16), "no full-attention layer"),
}


@pytest.mark.parametrize("method", [Full(), Delta.example(8), LazyEviction.example()], ids=name_of)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_refused_with_their_reason(kind, method):
    make, reason = OTHERS[kind]
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=reason), kvcomp.patch(model, method):
        model.generate(IDS, max_new_tokens=3, **GO)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", ["dots3_note", "dots3_note_text", "blt", "xlstm"])
def test_default_configs_are_refused_with_their_reason(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    reason = r"DynamicIndexedLayer|says nothing of its layers|requires its own cache class"
    with pytest.raises(ValueError, match=reason):
        kvcomp.patch(model, Full())


MODERNBERT = {"hidden_size": 128, "global_attn_every_n_layers": 2, "local_attention": 16}


@pytest.mark.parametrize("method", WHOLE[:-1], ids=name_of)
@pytest.mark.parametrize(
    ("kind", "more"),
    [("phi3", {"sliding_window": 512}), ("modernbert-decoder", MODERNBERT)],
)
def test_models_that_only_seem_to_be_other(kind, more, method):
    """A window that is never full; a model whose `get_decoder` is not what runs its layers."""
    model = random_model(kind, num_hidden_layers=8, **more)
    want = generate(model)
    with kvcomp.patch(model, method) as run:
        assert torch.equal(generate(model), want)
    assert run.report().tokens_decoded == 2 * 23


def test_a_window_that_gets_full_is_noticed():
    model = random_model("phi3", sliding_window=512)
    with kvcomp.patch(model, Full()) as run:
        cache = run.new_cache()
        with torch.no_grad():
            model(IDS.repeat(1, 25)[:, :512], past_key_values=cache)
            with pytest.raises(ValueError, match="window of 512 tokens is full"):
                model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="max_tokens: expected at most 512"):
        kvcomp.patch(model, Full(), max_tokens=600)


def test_layers_say_where_their_tokens_are():
    model = tiny_model("llama")
    with kvcomp.patch(model, Full()) as run:
        cache = run.new_cache()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        for name in ("keys", "values"):
            with pytest.raises(ValueError, match=r"see \.kv\.keys"):
                getattr(cache.layers[0], name)
        copy.deepcopy(cache).reset()
        assert cache.layers[0].kv.keys.shape[2] >= 21
