"""A run under what happens around it: other attention, an end in the middle, Ctrl-C, models that do
something else than their layers say. Never other tokens in silence, and nothing stays patched."""

import copy
import dataclasses
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, MllamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV
from kvcomp.cache import HostMemoryError
from kvcomp.hf.cache import Cache
from kvcomp.testing.models import COMMON, tiny_model
from slow import delethink as slow_delethink

IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(1))
GO = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "eos_token_id": 1000}
WHOLE = [  # with budgets for everything: the tokens of the model without kvcomp
    Full(),
    Delta(budget=4096, delta_layers=(2,)),
    LazyEviction(budget=4096),
    LouisKV(budget=4096, sinks=2, dense_layers=1),
    METHODS["h2o"].example(4096),
    dataclasses.replace(METHODS["quest"].example(24), budget=4096),
    Delethink(400, 100, head=4),
]
KINDS = [
    *((method, None) for method in WHOLE),
    *((method, 100) for method in WHOLE if method.static),
]


def name_of(value):
    return getattr(value, "name", None)


every_kind = pytest.mark.parametrize(("method", "max_tokens"), KINDS, ids=name_of)
every_method = pytest.mark.parametrize("method", WHOLE, ids=name_of)


def generate(model, steps=24, **options):
    return model.generate(IDS, max_new_tokens=steps, **{**GO, **options})


@pytest.fixture(scope="module")
def stock():
    return generate(tiny_model("llama"))


class Streamer:
    """Does something after so many tokens, between two forwards of `generate`."""

    def __init__(self, after, act):
        self.left, self.act = after, act

    def put(self, tokens):
        self.left -= 1
        if not self.left:
            self.act()

    def end(self):
        pass


def in_layer(model, act, call=8, layer=1):
    """`act` in the middle of a forward, the `call`-th."""
    calls = []

    def hook(*_):
        calls.append(0)
        if len(calls) == call:
            act()

    return model.model.layers[layer].register_forward_hook(hook)


# --- another attention implementation while patched


def by_method(model):
    model.set_attn_implementation("sdpa")


def by_field(model):
    model.config._attn_implementation = "eager"


def by_config_of_a_layer(model):
    attention = model.model.layers[2].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"


NOTICED = r"attention (implementation )?was (set to|not kvcomp)"


@pytest.mark.parametrize("switch", [by_method, by_field, by_config_of_a_layer])
@every_kind
def test_switched_attention_is_noticed(method, max_tokens, switch, stock):
    model = tiny_model("llama")
    with kvcomp.patch(model, method, max_tokens=max_tokens) as run:
        switch(model)
        with pytest.raises(ValueError, match=NOTICED):
            generate(model)
        assert not run.report().tokens_decoded
    if switch is not by_config_of_a_layer:
        assert torch.equal(generate(model), stock)


@every_method
def test_attention_switched_between_two_tokens(method):
    model = tiny_model("llama")
    with (
        kvcomp.patch(model, method),
        pytest.raises(ValueError, match="was set to 'sdpa' while it is patched"),
    ):
        model.generate(
            IDS[:1],
            do_sample=False,
            eos_token_id=1000,
            max_new_tokens=24,
            streamer=Streamer(5, lambda: by_method(model)),
        )


@pytest.mark.parametrize("method", [m for m in WHOLE if m.static], ids=name_of)
def test_a_compiled_step_notices_both(method):
    model = tiny_model("llama")
    run = kvcomp.patch(model, method, max_tokens=60)
    step, cache = run.compile(backend="eager", fullgraph=True), run.new_cache()
    with torch.no_grad():
        token = step(IDS, past_key_values=cache).logits[:, -1:].argmax(-1)
        by_method(model)
        with pytest.raises(ValueError, match=NOTICED):
            step(token, past_key_values=cache)
        run.undo()
        with pytest.raises(RuntimeError, match="undone"):
            step(token, past_key_values=cache)


# --- undo() while something generates


def by_thread(work):
    """Start a thread; what it returns, or the error that ended it, is in the list afterwards."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def ended(thread):
    thread.join(60)
    assert not thread.is_alive(), "a deadlock"


ONE = {"do_sample": False, "eos_token_id": 1000, "max_new_tokens": 40}


@pytest.mark.parametrize("threads", [1, 2])
@every_method
def test_the_block_is_left_while_threads_generate(method, threads, stock):
    model, running = tiny_model("llama"), []
    with kvcomp.patch(model, method):
        for _ in range(threads):
            some = threading.Event()
            streamer = Streamer(4, some.set)
            long = ONE | {"max_new_tokens": 2000}  # none ends by itself meanwhile
            running.append(by_thread(partial(model.generate, IDS[:1], **long, streamer=streamer)))
            assert some.wait(60)
    assert torch.equal(generate(model), stock)
    for thread, found in running:
        ended(thread)
        assert isinstance(found[0], (ValueError, RuntimeError)), found
        assert "undone" in str(found[0])


@every_kind
def test_undo_between_two_tokens(method, max_tokens, stock):
    model = tiny_model("llama")
    run = kvcomp.patch(model, method, max_tokens=max_tokens)
    with pytest.raises((ValueError, RuntimeError), match="undone"):
        model.generate(IDS[:1], **ONE, streamer=Streamer(5, run.undo))
    assert torch.equal(generate(model), stock)


@every_method
def test_undo_within_a_forward(method, stock):
    """It takes effect when the forward has ended, so that this one is still right."""
    model = tiny_model("llama")
    run = kvcomp.patch(model, method)
    handle = in_layer(model, run.undo, call=1)
    with torch.no_grad():
        first = model(IDS, past_key_values=run.new_cache(), use_cache=True).logits[:, -1].argmax(-1)
    handle.remove()
    assert torch.equal(first, stock[:, IDS.shape[1]])
    assert model.config._attn_implementation == run.inner_name
    assert torch.equal(generate(model), stock)


def test_two_threads_undo_within_their_forwards(stock):
    """Each waits for nobody: the last one to leave ends the run."""
    model = tiny_model("llama")
    run, both = kvcomp.patch(model, Full()), threading.Barrier(2)

    def act():
        both.wait(60)
        run.undo()

    handle = model.model.layers[1].register_forward_hook(lambda *_: act())
    running = [by_thread(lambda: model(IDS, use_cache=True).logits) for _ in range(2)]
    for thread, _ in running:
        ended(thread)
    handle.remove()
    for _, (logits,) in running:
        assert torch.equal(logits[:, -1].argmax(-1), stock[:, IDS.shape[1]])
    assert torch.equal(generate(model), stock)


def test_host_memory_runs_out_while_another_thread_generates(stock):
    model, method = tiny_model("llama"), LouisKV.example(64)
    with kvcomp.patch(model, method) as run:
        model.generate(IDS[:1], **ONE)
    enough = run.report().host_bytes_peak
    run = kvcomp.patch(model, dataclasses.replace(method, host_limit=2 * enough))
    some, refused = threading.Event(), threading.Event()

    def pause():
        some.set()
        refused.wait(60)

    streamer = Streamer(3, pause)
    thread, found = by_thread(partial(model.generate, IDS[:1], **ONE, streamer=streamer))
    assert some.wait(60)
    with pytest.raises(HostMemoryError):
        model.generate(IDS.repeat(1, 20), max_new_tokens=2, do_sample=False)
    refused.set()
    ended(thread)
    assert isinstance(found[0], Exception), found
    assert torch.equal(generate(model), stock)
    run.undo()


# --- Ctrl-C, and other ends in the middle of a forward


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@every_kind
def test_an_end_in_the_middle_of_a_forward(method, max_tokens, kind, stock, monkeypatch):
    """The memory is free, nothing stays patched, and the cache is refused: it is half-filled."""
    made, init = [], Cache.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    def act():
        raise kind("in the middle")

    monkeypatch.setattr(Cache, "__init__", noted)
    model = tiny_model("llama")
    run = kvcomp.patch(model, method, max_tokens=max_tokens)
    handle = in_layer(model, act)
    with pytest.raises(kind, match="in the middle"):
        generate(model)
    if max_tokens is None:  # else the memory is kept for the next call
        gc.collect()
        assert not any(cache() for cache in made)
    handle.remove()
    assert torch.equal(generate(model), stock)  # still patched, and well

    cache = run.new_cache()
    handle = in_layer(model, act)
    with pytest.raises(kind, match="in the middle"):
        generate(model, past_key_values=cache)
    handle.remove()
    other = tiny_model("llama")
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected the model that this cache was made for"):
            other(IDS[:, :1], past_key_values=cache)
        if not isinstance(method, Delethink):
            with pytest.raises(ValueError, match="failed half-way"):
                model(IDS[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.equal(generate(model, past_key_values=cache), stock)
    run.undo()
    gc.collect()
    del cache
    assert not any(cache() for cache in made)
    assert torch.equal(generate(model), stock)


@every_method
def test_a_run_keeps_no_cache(method, monkeypatch):
    made, init = [], Cache.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Cache, "__init__", noted)
    model = tiny_model("llama")
    run = kvcomp.patch(model, method)
    generate(model)
    gc.collect()
    assert not any(cache() for cache in made)
    run.undo()


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
