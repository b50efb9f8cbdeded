"""rotate_rows under a patched model: a decode step gets the same bits; nothing else changes."""

import pytest
import torch
from transformers.models.llama import modeling_llama

import kvcomp
from kvcomp import Full
from kvcomp.hf import rotary
from kvcomp.hf.rotary import TURNED, speed_up_rotations
from kvcomp.testing.models import tiny_model


@pytest.fixture
def calls(monkeypatch):
    """The shape of the queries of each call of the op by a layer."""
    seen, compute = [], rotary.COMPUTE

    def counted(q, k, cos, sin):
        out = compute(q, k, cos, sin)
        seen.append(tuple(q.shape))
        return out

    monkeypatch.setattr(rotary, "COMPUTE", counted)
    return seen


@pytest.fixture
def model():
    return tiny_model("llama").eval().requires_grad_(False)


def logits(model, length=1):
    ids = torch.arange(3, 3 + 2 * length).view(2, length)
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_step_has_the_bits_of_the_models_own(dtype, name, calls):
    model = tiny_model(name).eval().requires_grad_(False).to(dtype)
    want = [logits(model, length) for length in (1, 7)]
    count, undo = speed_up_rotations(model)
    calls.clear()
    got = [logits(model, length) for length in (1, 7)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert count == model.config.num_hidden_layers and len(calls) == 2 * count
    undo()
    logits(model)
    assert len(calls) == 2 * count
    assert not any({"forward", TURNED} & module.__dict__.keys() for module in model.modules())


def test_gradients_modes_and_large_inputs_are_the_models_own(model, calls, monkeypatch):
    speed_up_rotations(model)
    calls.clear()
    model.requires_grad_(True)
    logits(model).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    monkeypatch.setattr(rotary, "MOST", 1)
    logits(model)
    assert not calls


def test_a_rotation_that_is_another_one_stays(model, calls, monkeypatch):
    own = modeling_llama.apply_rotary_pos_emb

    def doubled(q, k, cos, sin):
        return tuple(2 * x for x in own(q, k, cos, sin))

    def interleaved(q, k, cos, sin):
        return own(k, q, cos, sin)[::-1]  # the same, with positions that have other names

    monkeypatch.setattr(modeling_llama, rotary.NAME, doubled)
    assert speed_up_rotations(model)[0] == 0
    monkeypatch.setattr(modeling_llama, rotary.NAME, interleaved)
    assert speed_up_rotations(model)[0] == model.config.num_hidden_layers


def test_one_that_is_replaced_later_is_seen(model, calls, monkeypatch):
    plain = logits(model, 3)
    speed_up_rotations(model)
    calls.clear()
    monkeypatch.setattr(modeling_llama, rotary.NAME, lambda q, k, cos, sin: (q + 1, k - 1))
    assert not torch.equal(logits(model, 3), plain) and not calls


def test_other_models_of_the_class_and_replaced_forwards_see_nothing(model, calls):
    other, hooked = tiny_model("llama").eval().requires_grad_(False), tiny_model("llama").eval()
    first = hooked.model.layers[0].self_attn
    first.forward = inner = first.forward
    assert speed_up_rotations(hooked)[0] == hooked.config.num_hidden_layers - 1
    assert first.forward is inner
    speed_up_rotations(model)
    calls.clear()
    logits(other)
    assert not calls
    assert speed_up_rotations(tiny_model("llama").to("meta"))[0] == 0


def test_hooks_see_the_calls_of_the_layers(model):
    speed_up_rotations(model)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, args, out: seen.append(out.shape)
        )
    logits(model)
    assert len(seen) == 2 * model.config.num_hidden_layers


def test_a_compiled_model_is_one_graph(model, fresh_dynamo):
    want = logits(model)
    speed_up_rotations(model)
    ids = torch.arange(3, 5).view(2, 1)
    step = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(step(input_ids=ids, use_cache=False).logits, want)


@pytest.mark.parametrize("on", [True, False])
def test_a_patched_model_decodes_with_it_and_reports_it(model, on, calls):
    ids = torch.randint(3, 100, (1, 20))
    with kvcomp.patch(model, Full(), linear_rows=on) as run:
        calls.clear()
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        report = run.report()
    assert report.rotate_rows_layers == (model.config.num_hidden_layers if on else 0)
    assert ("rotate_rows" in str(report)) == on == bool(calls)
    assert not any({"forward", TURNED} & module.__dict__.keys() for module in model.modules())
