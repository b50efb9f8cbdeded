#!/usr/bin/env bash
# Triton 3.7.1 in its interpreter (TRITON_INTERPRET=1) does not round as the compiled kernel does:
#   * float32 to bfloat16, in `.to` and in a store through a bfloat16 pointer, cuts the lower bits off. The
#     compiled kernel rounds to nearest (cvt.rn.bf16.f32), and so does torch. Half of all numbers come out
#     one unit nearer to zero.
#   * float32 to float8e4nv rounds half up, and a carry into the exponent is lost where the exponent is
#     odd: 1.95 becomes 1 and not 2, and 500 becomes 256. Such numbers are wrong by a factor of 2. The
#     compiled kernel rounds to nearest even and ends at 448 (cvt.rn.satfinite.e4m3x2.f32).
# So a test of a kernel in the interpreter needs wider bounds than on a GPU, and a quantised cache looks
# worse than it is. No warning is given. (The guide to debugging says that bfloat16 operations are not
# supported there and to convert to float32, which such a kernel does.)
#
# Seen, of 4096 normally distributed numbers: half differ in bfloat16, all nearer to zero, and 2 % are
# halved in float8e4nv.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cd "$work"
cat > kernel.py <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def cast(x, out, size: tl.constexpr, dtype: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at).to(dtype).to(tl.float32))


@triton.jit
def store(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at))
PYTHON
cat > compiled.py <<'PYTHON'
# The compiler needs no GPU when it is told the target.
import triton
import triton.language as tl
from kernel import cast, store
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def instructions(kernel, out: str, constants: dict) -> set[str]:
    signature = {"x": "*fp32", "out": out} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return {word for word in ptx.split() if word.startswith("cvt.rn")}


print("triton", triton.__version__, "compiled for sm_90:")
for name, found, expected in (
    ("to bfloat16", instructions(cast, "*fp32", {"size": 128, "dtype": tl.bfloat16}), "bf16"),
    ("stored as bfloat16", instructions(store, "*bf16", {"size": 128}), "bf16"),
    ("to float8e4nv", instructions(cast, "*fp32", {"size": 512, "dtype": tl.float8e4nv}), "satfinite.e4m3x2"),
):
    print(f"   {name}: {', '.join(sorted(found))}")
    assert any(expected in word for word in found), "changed: the compiled kernel"
PYTHON
cat > interpreted.py <<'PYTHON'
import torch
import triton.language as tl
from kernel import cast, store

torch.manual_seed(0)
numbers = torch.randn(4096)
stored, to_bfloat16, to_float8 = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096), torch.empty(4096)
store[(1,)](numbers, stored, 4096)
cast[(1,)](numbers, to_bfloat16, 4096, tl.bfloat16)
cast[(1,)](numbers, to_float8, 4096, tl.float8e4nv)

cut = (numbers.view(torch.int32) & ~0xFFFF).view(torch.float32)
differs = cut != numbers.bfloat16().float()
print(f"interpreted: {differs.float().mean():.1%} in bfloat16 are not the nearest")
assert 0.4 < differs.float().mean() < 0.6
assert torch.equal(to_bfloat16, cut) and torch.equal(stored.float(), cut), "changed: bfloat16 is rounded"

nearest = numbers.to(torch.float8_e4m3fn).float()
normal = nearest.abs() > 2**-5  # float8's subnormal numbers aside
halved = (to_float8 == nearest / 2)[normal]
print(f"interpreted: {halved.float().mean():.1%} in float8e4nv are half the nearest number")
assert 0.02 < halved.float().mean() < 0.05, "changed: float8"
few = torch.tensor([1.95, 7.9, 1.0625, 500.0])
seen = torch.empty(4)
cast[(1,)](few, seen, 4, tl.float8e4nv)
for number, found, right in zip(few.tolist(), seen.tolist(), few.to(torch.float8_e4m3fn).tolist(), strict=True):
    print(f"   {number:8.4f} is {found:6.3f}, nearest {right:6.3f}")
assert seen.tolist() == [1.0, 4.0, 1.125, 256.0], "changed: float8"
PYTHON
"$work/venv/bin/python" compiled.py
TRITON_INTERPRET=1 "$work/venv/bin/python" interpreted.py
