#!/usr/bin/env bash
# Triton 3.7.1: a device function may take None, return None, and return a tuple in which None is written out,
# so optional tensors can be passed around as None. But a tuple with a local name that holds None cannot be
# returned: the compiler ends with AttributeError("'NoneType' object has no attribute 'type'").
#
#     def fails(x, scale):              def works(x, scale):
#         again = None                      return x, None
#         return x, again
#
# The interpreter (TRITON_INTERPRET=1) runs both. So a kernel that a test on a CPU has covered may not compile
# on a GPU, and only for the callers that leave the optional argument out. (kvcomp loads an optional tile in
# the kernel itself and passes it down; its tests compile every kernel for a target, which needs no GPU.)
#
# Seen: of six ways to hand on None the compiler takes four and the interpreter all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cd "$work"
cat > ways.py <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def written(x, scale):
    return x, None


@triton.jit
def handed_through(x, scale):
    return x, scale


@triton.jit
def local(x, scale):
    again = None
    return x, again


@triton.jit
def local_unless_given(x, scale):
    again = None
    if scale is not None:
        again = scale
    return x, again


@triton.jit
def local_alone(x, scale):
    again = None
    return again


@triton.jit
def scaled(x, scale):
    if scale is not None:
        x *= scale
    return x


@triton.jit
def with_written(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    y, scale = written(tl.load(x + at), None)
    tl.store(out + at, scaled(y, scale))


@triton.jit
def with_handed_through(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    y, scale = handed_through(tl.load(x + at), None)
    tl.store(out + at, scaled(y, scale))


@triton.jit
def with_local(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    y, scale = local(tl.load(x + at), None)
    tl.store(out + at, scaled(y, scale))


@triton.jit
def with_local_unless_given(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    y, scale = local_unless_given(tl.load(x + at), None)
    tl.store(out + at, scaled(y, scale))


@triton.jit
def alone(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    y = tl.load(x + at)
    tl.store(out + at, scaled(y, local_alone(y, None)))


@triton.jit
def unpacked(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    y, scale = tl.load(x + at), None
    tl.store(out + at, scaled(y, scale))


KERNELS = {
    "written": with_written,
    "handed_through": with_handed_through,
    "local": with_local,
    "local_unless_given": with_local_unless_given,
    "local_alone": alone,
    "unpacked": unpacked,
}
PYTHON
cat > compiled.py <<'PYTHON'
# The compiler needs no GPU when it is told the target.
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from ways import KERNELS

print("triton", triton.__version__, "compiled for sm_90:")
failed = []
for name, kernel in KERNELS.items():
    signature = {"x": "*fp32", "out": "*fp32", "size": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"size": 128})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(f"   {name}: compiles")
    except CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        reason = str(error).splitlines()[-1]
        print(f"   {name}: {reason}")
        assert "'NoneType' object has no attribute 'type'" in reason, "changed: the error"
        failed.append(name)
assert failed == ["local", "local_unless_given"], f"changed: {failed} fail"
PYTHON
cat > interpreted.py <<'PYTHON'
import torch
from ways import KERNELS

numbers = torch.randn(128)
for name, kernel in KERNELS.items():
    out = torch.empty(128)
    kernel[(1,)](numbers, out, 128)
    assert torch.equal(out, numbers), f"changed: {name}"
print(f"interpreted: all {len(KERNELS)} run")
PYTHON
"$work/venv/bin/python" compiled.py
TRITON_INTERPRET=1 "$work/venv/bin/python" interpreted.py
