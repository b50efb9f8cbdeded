"""linear_rows under a patched model: layers compute the same on few rows; nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import kvcomp
from kvcomp import Full, ops
from kvcomp.hf import linear
from kvcomp.hf.linear import LinearLayers, speed_up
from kvcomp.testing.models import tiny_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """The number of rows of each call of the op by a layer."""
    seen, compute = [], linear.COMPUTE

    def counted(x, weight, bias):
        out = compute(x, weight, bias)
        seen.append(x.numel() // x.shape[-1])
        return out

    monkeypatch.setattr(linear, "COMPUTE", counted)
    return seen


def layer(dtype=torch.float32, bias=True):
    made = nn.Linear(40, 24, bias=bias, dtype=dtype).requires_grad_(False)
    assert speed_up(made)[0] == LinearLayers(1, 0)
    return made


def same_as_torch(made, x):
    want = nn.functional.linear(x, made.weight, made.bias)
    torch.testing.assert_close(made(x), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (1, 1, 40), (8, 40), (4, 8, 40)])
def test_few_rows_of_every_dtype_go_through_the_op(dtype, shape, calls):
    same_as_torch(layer(dtype), torch.randn(shape).to(dtype))
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(33, 40), (3, 11, 40)])
def test_many_rows_are_left_to_torch(shape, calls):
    same_as_torch(layer(), torch.randn(shape))
    assert not calls


def test_rows_have_the_same_bits_alone_together_and_under_any_number_of_threads():
    weight, bias = torch.randn(1030, 333).bfloat16(), torch.randn(1030).bfloat16()
    x = torch.randn(21, 333).bfloat16()
    threads = torch.get_num_threads()
    want = ops.linear_rows(x, weight, bias)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.linear_rows(x, weight, bias), want)
            for rows in (*range(1, 9), 16, 20):
                assert torch.equal(ops.linear_rows(x[:rows], weight, bias), want[:rows])
    finally:
        torch.set_num_threads(threads)


def test_torchs_own_kernels_are_not_disturbed_between_calls():
    """Both may use the tile registers, whose shapes are a state of the thread."""
    x, weight = torch.randn(64, 160).bfloat16(), torch.randn(96, 160).bfloat16()
    want = nn.functional.linear(x, weight)
    for rows in (1, 16, 17, 32):
        own = ops.linear_rows(x[:rows], weight)
        torch.testing.assert_close(own, want[:rows], rtol=2e-2, atol=2e-2)
        assert torch.equal(nn.functional.linear(x, weight), want)


def test_gradients_are_torchs(calls):
    made = layer().requires_grad_(True)
    x = torch.randn(2, 40, requires_grad=True)
    made(x).sum().backward()
    assert not calls and made.weight.grad is not None and x.grad is not None
    with torch.no_grad():
        made(x)
    assert calls == [2]


def test_autocast_modes_transforms_and_tracing_go_their_own_way(calls):
    made, x = layer(), torch.randn(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x))
    assert "aten::linear" in str(torch.jit.trace(made, x).inlined_graph)
    calls.clear()
    with FlopCounterMode(display=False) as counter:
        made(x)
    assert counter.get_total_flops() > 0 and not calls


def test_what_torch_refuses_is_refused_in_torchs_words():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer()(torch.randn(2, 39))
    with pytest.raises(RuntimeError, match="dtype"):
        layer()(torch.randn(2, 40).half())


def test_strided_and_empty_inputs(calls):
    same_as_torch(layer(), torch.randn(40, 3).t())
    same_as_torch(layer(), torch.randn(0, 40))
    same_as_torch(layer(bias=False), torch.randn(3, 80)[:, ::2])


def test_weights_may_be_replaced_moved_and_parametrised(calls):
    made, x = layer(), torch.randn(2, 40)
    made.weight = nn.Parameter(torch.randn(24, 40), requires_grad=False)
    same_as_torch(made, x)
    made.bfloat16()
    same_as_torch(made, x.bfloat16())
    assert len(calls) == 2
    assert made.to("meta")(x.bfloat16().to("meta")).is_meta
    made = layer()

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(made, "weight", Doubled())
    same_as_torch(made, x)
    assert len(calls) == 2


def test_copies_and_pickles_have_their_own_weights():
    made, x = layer(), torch.randn(2, 40)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        other.weight.zero_()
        torch.testing.assert_close(other(x), made.bias.expand(2, 24))
    assert made(x).abs().max() > 0.1


def test_other_layers_keep_their_forward():
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(8, 8)
    hooked.forward = lambda x: x
    model = nn.Sequential(
        Own(8, 8), hooked, nn.Linear(8, 8).double(), nn.Linear(8, 8, device="meta")
    )
    counts, undo = speed_up(model)
    assert counts == LinearLayers(0, 4)
    undo()
    assert "forward" in hooked.__dict__


def test_undo_takes_away_only_what_was_put_there():
    plain, wrapped = nn.Linear(8, 8), nn.Linear(8, 8)
    _, undo = speed_up(nn.Sequential(plain, wrapped))
    inner = wrapped.forward
    wrapped.forward = lambda x: inner(x) + 1
    undo()
    assert "forward" not in plain.__dict__ and "forward" in wrapped.__dict__
    x = torch.randn(2, 8)
    torch.testing.assert_close(
        wrapped(x), nn.functional.linear(x, wrapped.weight, wrapped.bias) + 1
    )


def test_hooks_of_a_layer_run():
    made, seen = layer(), []
    made.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    made(torch.randn(2, 40))
    assert seen == [(2, 24)]


def test_a_compiled_layer_is_one_graph(fresh_dynamo):
    made, x = layer(), torch.randn(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), made(x))


@pytest.mark.parametrize("on", [True, False])
def test_a_patched_model_decodes_with_them_and_reports_it(on, calls):
    model = tiny_model("llama").eval()
    ids = torch.randint(3, 100, (1, 20))
    with kvcomp.patch(model, Full(), linear_rows=on) as run:
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        report = run.report()
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert report.linear_rows_layers == (count if on else 0) and report.other_linear_layers == 0
    assert ("linear_rows" in str(report)) == on == bool(calls)
    assert not any("forward" in module.__dict__ for module in model.modules())
