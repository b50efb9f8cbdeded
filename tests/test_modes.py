"""Models under the modes of torch and of the libraries around transformers: training with gradient
checkpointing, autocast, inference mode, PEFT, weights that accelerate keeps elsewhere."""

import pytest
import torch

import kvcomp
from kvcomp import METHODS, Delethink, Full
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0
STEPS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 1000}


def small(name):
    return METHODS[name].example(*(() if name == "full" else (24,)))


def generate(model, mask=MASK, **options):
    return model.generate(input_ids=IDS, attention_mask=mask, **STEPS, **options)


def tokens(name, max_tokens=None):
    """What a method decodes in the plain mode."""
    model = tiny_model("llama")
    with kvcomp.patch(model, small(name), max_tokens=max_tokens):
        return generate(model)


def flavours():
    for name, method in METHODS.items():
        yield pytest.param(name, None, id=name)
        if method.static:
            yield pytest.param(name, 80, id=f"{name}-static")


FLAVOURS = pytest.mark.parametrize("name, max_tokens", list(flavours()))


# Gradient checkpointing.


@FLAVOURS
def test_gradient_checkpointing(name, max_tokens):
    """A training step is the stock one; what `generate` rolls out are the method's tokens."""

    def gradients(model):
        model.zero_grad()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    stock = gradients(model)
    with kvcomp.patch(model, small(name), max_tokens=max_tokens) as run:
        for got, want in zip(gradients(model), stock, strict=True):
            torch.testing.assert_close(got, want)
        assert torch.equal(generate(model), tokens(name, max_tokens))
        assert run.report().tokens_decoded > 0
        assert model.is_gradient_checkpointing
        with pytest.raises(ValueError, match=r"trains with gradient checkpointing has no cache"):
            model(IDS, past_key_values=run.new_cache())
        gradients(model)
    assert model.model.layers[0].gradient_checkpointing


# Autocast.


@FLAVOURS
def test_weights_in_32_bits_under_autocast(name, max_tokens):
    """K and V are kept in the type in which stock attention sees them."""
    model = tiny_model("llama")
    for mask in (MASK, torch.ones_like(IDS)):
        with kvcomp.patch(model, small(name), max_tokens=max_tokens) as run:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model.generate(
                    IDS, attention_mask=mask, **STEPS, return_dict_in_generate=True
                )
            assert run.report().tokens_decoded == 2 * 23
            cache = out.past_key_values
            layer = getattr(cache, "context", cache).kv.layers[-1]
            assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


def test_under_autocast_all_that_is_dense_gives_the_logits_of_stock():
    model = tiny_model("llama")
    following = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))

    def logits(cache=None):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(IDS, past_key_values=cache, use_cache=True)
            steps = [out.logits[:, -1]]
            for token in following.T:
                out = model(token[:, None], past_key_values=out.past_key_values)
                steps.append(out.logits[:, -1])
        return torch.stack(steps).float()

    stock = logits()
    for name in METHODS:
        if name == "delethink":
            continue
        method = Full() if name == "full" else METHODS[name].example(256)
        with kvcomp.patch(model, method):
            apart = (logits() - stock).abs().mean() / stock.abs().mean()
            assert apart < 0.03, name


def test_keys_and_values_of_two_types_are_refused():
    cache = kvcomp.cache.KVCache(Full(), 1)
    k = torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match=r"expected k and v of one, got .*32 and .*bfloat16"):
        cache.layers[0].append(k, k.bfloat16())


# Inference mode.


@FLAVOURS
def test_calls_in_inference_mode_and_outside(name, max_tokens):
    """Two calls with a cache each, and a second turn: in any order."""
    expected, model = tokens(name, max_tokens), tiny_model("llama")
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode]
    with torch.inference_mode():
        run = kvcomp.patch(model, small(name), max_tokens=max_tokens)
    with run:
        for mode in modes:
            with mode():
                assert torch.equal(generate(model), expected)
                run.report()
        if name == "delethink":
            return
        turns = []
        for first, second in (modes[:2], modes[1:], modes[1:2] * 2):
            with first():
                out = generate(model, return_dict_in_generate=True)
            cache = out.past_key_values
            with second():
                ids = torch.cat([out.sequences, IDS[:, :5]], 1)
                mask = torch.cat([MASK, torch.ones(2, ids.shape[1] - 21, dtype=torch.long)], 1)
                given = {"attention_mask": mask, "past_key_values": cache}
                turns.append(model.generate(ids, **given, max_new_tokens=10, do_sample=False))
        assert torch.equal(turns[0], turns[1]) and torch.equal(turns[0], turns[2])


# PEFT.


def peft_model(**config):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    kind = peft.PrefixTuningConfig if "num_virtual_tokens" in config else peft.LoraConfig
    return peft.get_peft_model(tiny_model("llama"), kind(task_type="CAUSAL_LM", **config)).eval()


@pytest.mark.parametrize("name", ["full", "lazy-eviction", "delethink"])
def test_a_peft_model_is_patched_as_its_base_model(name):
    model = peft_model(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with kvcomp.patch(model.get_base_model(), small(name)):
        expected = generate(model)
    with kvcomp.patch(model, small(name)) as run:
        assert torch.equal(generate(model), expected)
        assert run.report().tokens_decoded == 2 * 23


def test_prefix_tuning_is_refused():
    model = peft_model(num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prefix tuning brings keys and values"):
        kvcomp.patch(model, Full())
    with (
        kvcomp.patch(model.get_base_model(), Full()),
        pytest.raises(ValueError, match="prefix tuning brings keys and values"),
    ):
        generate(model)


# Weights elsewhere.


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(
    "method",
    [
        *(small(name) for name in METHODS if small(name).moves_keys),
        Delethink(16, 8, head=2, max_chunks=None, reset="rotate"),
        Full(),
    ],
    ids=lambda method: method.name,
)
def test_weights_that_accelerate_keeps_elsewhere(method, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    with kvcomp.patch(model, method):
        expected = generate(model)
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    with kvcomp.patch(model, method):
        assert torch.equal(generate(model), expected)
