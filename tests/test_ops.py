"""THE op test: op x implementation x case x dtype against the reference in float64."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

import kvcomp
from bad_input import op_calls
from kvcomp.ops import OPS, _registry
from kvcomp.selftest.cases import CASES
from kvcomp.selftest.compare import check

DEVICES = {"cuda": "cuda", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def runs():
    for case in CASES:
        for name in OPS[case.op].impls:
            if name in case.refused_by:
                continue
            device = DEVICES.get(name, "cpu")
            if device == "cuda" and not torch.cuda.is_available():
                continue
            for dtype in case.dtypes:
                yield pytest.param(case, name, device, dtype, id=f"{case}-{name}-{dtype}"[:90])


@pytest.mark.parametrize("case, name, device, dtype", list(runs()))
def test_op(case, name, device, dtype, poisoned_outputs):
    check(case, name, dtype, device)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    """Schema, mutation, fake tensors and the autograd registration, by torch's own checks."""
    for case in CASES:
        if case.op == name and not case.refused_by:
            op = getattr(torch.ops.kvcomp, name).default
            args = case.make(torch.float32, "cpu")
            torch.library.opcheck(op, [a.nan_to_num(0.0) if _is_float(a) else a for a in args])


@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_break(name, poisoned_outputs):
    torch.compiler.reset()  # or the ops before this one count as recompilations of the lambda
    op = getattr(kvcomp.ops, name)
    compiled = torch.compile(lambda args, named: op(*args, **named), fullgraph=True)
    mine, theirs = [], []
    for run, into in (compiled, mine), (lambda args, named: op(*args, **named), theirs):
        torch.manual_seed(0)
        call = getattr(op_calls, name)()
        result = run(call.args, call.named)
        into += pytree.tree_leaves((result, call.args, call.named))  # also what the op wrote
    for got, want in zip(mine, theirs, strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_kmeans_takes_no_wrong_turn_in_many_iterations():
    """What a kernel skips, because it cannot have changed, matters only after a few of them."""
    keys = torch.randn(1, 2, 1000, 64, generator=torch.Generator().manual_seed(5))
    args = (keys, torch.tensor([0], dtype=torch.int32), torch.tensor([1000], dtype=torch.int32))
    got = OPS["kmeans"].impl("cpu")(*args, 16, 600, 12)
    want = OPS["kmeans"].reference(args[0].double(), *args[1:], 16, 600, 12)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    torch.testing.assert_close(got[1], want[1].float())


def test_an_op_may_begin_as_its_reference():
    def reference(x, weights, scale):
        return sum(x @ w for w in weights) * scale

    def fake(x, weights, scale):
        return x.new_empty(x.size(0), weights[0].size(1))

    schema = "(Tensor x, Tensor[] weights, float scale) -> Tensor"
    call = _registry.bind("sum_of_products", schema, reference=reference, fake=fake)
    op = OPS.pop("sum_of_products")  # the other tests are about ops that stay
    assert op.bound == {"cpu": "reference", "cuda": "reference"}
    assert op.missing == dict.fromkeys(("cpu", "cuda", "triton"), "not written")
    x, weights = torch.randn(3, 8), [torch.randn(8, 5) for _ in range(2)]
    want = reference(x.double(), [w.double() for w in weights], 0.5)
    torch.testing.assert_close(call(x, weights, 0.5), want.float())
    half = call(x.bfloat16(), [w.bfloat16() for w in weights], 0.5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want.float(), rtol=0.05, atol=0.1)
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True)
    torch.testing.assert_close(compiled(x, weights, 0.5), want.float())
    for bad, error, match in [
        ((None, weights, 0.5), TypeError, "'x': expected a tensor, got None"),
        ((x, weights[0], 0.5), TypeError, "'weights': expected a list of tensors"),
        ((x, weights, "0.5"), TypeError, "'scale': expected a number, got '0.5'"),
        ((x, [weights[0], weights[1].to("meta")], 0.5), ValueError, "'weights': .*'x', cpu, got"),
    ]:
        with pytest.raises(error, match=rf"^kvcomp\.sum_of_products: argument {match}"):
            call(*bad)


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("isa, said", [("scalar", "^scalar$"), ("sse", "expected one of scalar")])
def test_the_cap_on_the_instruction_set_is_obeyed(isa, said):
    code = "import torch, kvcomp._C as c\ntry: print(c.cpu_isa())\nexcept ValueError as e: print(e)"
    environment = os.environ | {"KVCOMP_ISA": isa}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert re.search(said, run.stdout.strip()), run.stdout + run.stderr


@pytest.mark.parametrize(
    "with_cuda, suffices, said",
    [(False, True, "has no CUDA kernels"), (True, False, "CUDA 13.0, too new"), (True, True, None)],
)
def test_cuda_kernels_are_passed_over_where_they_could_not_run(
    monkeypatch, with_cuda, suffices, said
):
    class Built:
        build_info = staticmethod(lambda: {"with_cuda": with_cuda, "cuda_version": "13.0"})
        cuda_driver_suffices = staticmethod(lambda: suffices)

    monkeypatch.setattr(_registry, "_C", Built)
    reason = _registry._why_no_cuda.__wrapped__()
    assert said in reason if said else reason is None
