"""norm_rows under a patched model: norms compute the same on few rows; nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import kvcomp
from kvcomp import Full, ops
from kvcomp.hf import norm
from kvcomp.hf.norm import speed_up_norms
from kvcomp.testing.models import tiny_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """The number of elements of each call of the op by a layer."""
    seen, compute = [], norm.COMPUTE

    def counted(x, weight, eps):
        out = compute(x, weight, eps)
        seen.append(x.numel())
        return out

    monkeypatch.setattr(norm, "COMPUTE", counted)
    return seen


def layer(dtype=torch.float32, kind=LlamaRMSNorm, eps=1e-5):
    made = kind(40, eps).to(dtype).requires_grad_(False)
    made.weight.normal_()
    return made


def patched(*given, **wanted):
    made = layer(*given, **wanted)
    assert speed_up_norms(made)[0] == 1
    return made


def same_as_own(made, x):
    torch.testing.assert_close(made(x), type(made).forward(made, x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, nn.RMSNorm])
def test_rms_norms_go_through_the_op(dtype, kind, calls):
    made = patched(dtype, kind)
    calls.clear()
    for shape in (40,), (1, 1, 40), (2, 3, 40):
        same_as_own(made, torch.randn(shape).to(dtype))
    assert calls == [40, 40, 240]


def test_each_layer_keeps_its_eps():
    x = torch.full((1, 40), 1e-4)
    for eps in 1e-5, 1e-6, 1e-8:
        made = patched(eps=eps)
        torch.testing.assert_close(made(x), type(made).forward(made, x))
    assert made(x).norm() > 3 * patched(eps=1e-6).train()(x / 10).norm()


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Grouped(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x.unflatten(-1, (2, 20)).repeat(1, 1, 2)[..., 0, :])


class Pair(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("kind", [Centred, Gated, Grouped, Pair])
def test_layers_that_compute_something_else_keep_their_forward(kind):
    made = layer(kind=kind)
    assert speed_up_norms(made)[0] == 0 and "forward" not in made.__dict__


def test_layers_that_may_look_like_an_rms_norm_keep_their_forward():
    gemma = Gemma3RMSNorm(40)
    for value in 0.0, 1.0:  # the layer multiplies by 1 + weight
        with torch.no_grad():
            gemma.weight.fill_(value)
        assert speed_up_norms(gemma)[0] == 0
    hooked = layer()
    hooked.forward = lambda x: x
    others = hooked, nn.LayerNorm(40, bias=False), nn.LayerNorm(40), layer().to("meta")
    assert speed_up_norms(nn.ModuleList([*others, layer().double()]))[0] == 0


def test_a_trial_draws_nothing_from_torchs_generator():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    patched(dtype=torch.float32).weight.fill_(1)
    torch.manual_seed(3)
    speed_up_norms(nn.RMSNorm(8, eps=1e-6))
    assert torch.equal(torch.rand(4), want)


def test_gradients_autocast_and_large_inputs_are_the_layers_own(calls):
    made = patched().requires_grad_(True)
    calls.clear()
    x = torch.randn(2, 40, requires_grad=True)
    made(x).sum().backward()
    assert made.weight.grad is not None and x.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            made(x)
        made(torch.randn(1 << 13, 40))
        made(hidden_states=x)
        torch.func.vmap(made)(x)
        assert not calls
        made(x)
        assert "aten::rsqrt" in str(torch.jit.trace(made, x, check_trace=False).inlined_graph)
    assert calls == [80]


def test_other_dtypes_layouts_and_replaced_weights(calls):
    made = patched()
    calls.clear()
    same_as_own(made, torch.randn(2, 40).bfloat16())
    same_as_own(made, torch.randn(40, 3).t())
    same_as_own(made, torch.randn(0, 40))
    made.weight = nn.Parameter(torch.randn(40), requires_grad=False)
    same_as_own(made, torch.randn(2, 40))
    made.variance_epsilon = 1.0
    same_as_own(made, torch.randn(2, 40))
    assert calls == [0, 80, 80]
    with pytest.raises(RuntimeError, match="size"):
        made(torch.randn(2, 39))


def test_copies_and_pickles_have_their_own_weights():
    made, x = patched(), torch.randn(2, 40)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        other.weight.zero_()
        assert not other(x).any()
    assert made(x).any()


def test_undo_takes_away_only_what_was_put_there():
    plain, wrapped = layer(), layer()
    _, undo = speed_up_norms(nn.Sequential(plain, wrapped))
    inner = wrapped.forward
    wrapped.forward = lambda x: inner(x) + 1
    undo()
    assert not {"forward", norm.EPS} & plain.__dict__.keys() and "forward" in wrapped.__dict__
    x = torch.randn(2, 40)
    torch.testing.assert_close(wrapped(x), type(wrapped).forward(wrapped, x) + 1)


def test_rows_have_the_same_bits_alone_together_and_under_any_number_of_threads():
    x, weight = torch.randn(700, 333).bfloat16(), torch.randn(333).bfloat16()
    threads = torch.get_num_threads()
    want = ops.norm_rows(x, weight, 1e-6)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.norm_rows(x, weight, 1e-6), want)
            assert torch.equal(ops.norm_rows(x[7:8], weight, 1e-6), want[7:8])
    finally:
        torch.set_num_threads(threads)


def test_a_compiled_layer_is_one_graph(fresh_dynamo):
    made, x = patched(), torch.randn(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), made(x))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("on", [True, False])
def test_a_patched_model_decodes_with_them_and_reports_it(name, on, calls):
    model = tiny_model(name).eval()
    ids = torch.randint(3, 100, (1, 20))
    with kvcomp.patch(model, Full(), linear_rows=on) as run:
        calls.clear()
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        report = run.report()
    norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
    assert report.norm_rows_layers == (norms if on else 0)
    assert ("norm_rows" in str(report)) == on == bool(calls)
    assert not any({"forward", norm.EPS} & module.__dict__.keys() for module in model.modules())
