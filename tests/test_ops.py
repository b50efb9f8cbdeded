"""THE op test: op x implementation x case x dtype against the reference in float64."""

import pytest
import torch

from kvcomp.ops import OPS
from kvcomp.testing.cases import CASES
from kvcomp.testing.compare import assert_close, in_float64, outputs

DEVICES = {"cuda": "cuda", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def runs():
    for case in CASES:
        for name in OPS[case.op].impls:
            device = DEVICES.get(name, "cpu")
            if device == "cuda" and not torch.cuda.is_available():
                continue
            for dtype in case.dtypes:
                yield pytest.param(case, name, device, dtype, id=f"{case}-{name}-{dtype}"[:90])


@pytest.mark.parametrize("case, name, device, dtype", runs())
def test_op(case, name, device, dtype, poisoned_outputs):
    op = OPS[case.op]
    args = case.make(dtype, device)
    truth = outputs(op.reference, in_float64(case.make(dtype, device)), case.mutates)
    fallback = outputs(op.impls["reference"], case.make(dtype, device), case.mutates)
    actual = outputs(op.impls[name], args, case.mutates)
    assert len(actual) == len(truth)
    for index, (got, want, plain) in enumerate(zip(actual, truth, fallback, strict=True)):
        what = f"{case} {name} output {index}"
        if not got.is_floating_point():
            assert torch.equal(got, want), f"{what}: {got} is not {want}"
        elif index == len(truth) - 1 and case.mutates is not None:
            written = want.isfinite()  # what lies outside the attended positions is unspecified
            assert_close(got[written], want[written], plain[written], what)
        else:
            assert_close(got, want, plain, what)
