"""Every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, without spills.

No GPU is needed. `python tests/test_triton_compile.py` prints a line per kernel: registers, shared
memory, spills. A kernel enters with one line in CALLS: the arguments of its op's launch().
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

CAPABILITIES = (80, 90, 100)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")  # shapes are all that launch() looks at


def attention(dtype, head_dim, group=4, slots=16384, page_size=0, logits=False):
    """Arguments of decode_attention for two KV heads; page_size 0 is dense."""
    kv = empty(2, 2, slots, head_dim, dtype=dtype)
    ids = empty(2, 2, 4096 // page_size, dtype=torch.int32) if page_size else None
    side = empty(2, 2 * group, slots) if logits else None
    q = empty(2, 2 * group, head_dim, dtype=dtype)
    return q, kv, kv, lens(2), ids, max(page_size, 1), head_dim**-0.5, side


def lens(batch):
    return empty(batch, dtype=torch.int32)


# (op, what is special about the call, arguments of launch)
CALLS = [
    ("decode_attention", "bf16 D32", attention(BF16, 32)),
    ("decode_attention", "bf16 D64", attention(BF16, 64)),
    ("decode_attention", "bf16 D80 logits", attention(BF16, 80, logits=True)),
    ("decode_attention", "bf16 D96 page 1", attention(BF16, 96, page_size=1)),
    ("decode_attention", "bf16 D128", attention(BF16, 128)),
    ("decode_attention", "bf16 D128 logits", attention(BF16, 128, logits=True)),
    ("decode_attention", "bf16 D128 page 1", attention(BF16, 128, page_size=1)),
    ("decode_attention", "bf16 D128 page 16", attention(BF16, 128, page_size=16)),
    ("decode_attention", "bf16 D128 page 64", attention(BF16, 128, page_size=64)),
    ("decode_attention", "bf16 D128 G 40", attention(BF16, 128, group=40)),
    ("decode_attention", "bf16 D256", attention(BF16, 256)),
    ("decode_attention", "bf16 D256 page 16 G 40", attention(BF16, 256, 40, page_size=16)),
    ("decode_attention", "fp16 D64 page 16", attention(FP16, 64, page_size=16)),
    ("decode_attention", "fp16 D128", attention(FP16, 128)),
    ("decode_attention", "fp32 D32", attention(FP32, 32)),
    ("decode_attention", "fp32 D128 logits", attention(FP32, 128, logits=True)),
    ("decode_attention", "fp32 D256 page 16 G 40", attention(FP32, 256, 40, page_size=16)),
]


def recorded_launches(capability):
    """(label, source, options) of each distinct kernel that the calls launch."""
    import importlib

    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launches = []
    JITFunction.run = lambda kernel, *args, **kwargs: launches.append((kernel, args, kwargs))
    found = {}
    for op, label, args in CALLS:
        importlib.import_module(f"kvcomp.ops.triton.{op}").launch(*args)
        for kernel, values, keywords in launches:
            signature, constants, attributes = specialize(kernel, values, keywords)
            options = {name: keywords[name] for name in ("num_warps", "num_stages") if name in keywords}
            key = (kernel.__name__, str(signature), str(constants), str(options), str(attributes))
            source = ASTSource(kernel, signature, constants, attributes)
            found.setdefault(key, (f"{kernel.__name__:24} {label}", source, options))
        launches.clear()
    return list(found.values())


def specialize(kernel, values, keywords):
    """What Triton's own launcher derives from the arguments: types, constants, divisibility."""
    types = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int32: "*i32"}
    bound = dict(zip(kernel.arg_names, values, strict=False))
    bound.update((name, keywords[name]) for name in kernel.arg_names if name in keywords)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, name = bound[parameter.name], parameter.name
        by_value = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (by_value and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if by_value and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_all(capability: int) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget

    rows = []
    for label, source, options in recorded_launches(capability):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        rows.append({"kernel": label, "sm": capability, **resources(compiled)})
    return rows


def resources(compiled) -> dict:
    """Registers and stack (where spills go) of the machine code, as its own header tells."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "registers": usage["REG"],
        "shared": compiled.metadata.shared,
        "spilled": usage["STACK"] + usage["LOCAL"],
        "warps": compiled.metadata.num_warps,
        **({"asm": dict(compiled.asm)} if os.environ.get("KEEP") else {}),
    }


def report() -> list[dict]:
    with ProcessPoolExecutor(2) as pool:
        return [row for rows in pool.map(compile_all, CAPABILITIES) for row in rows]


if __name__ == "__main__":
    import time
    t = time.time()
    for r in report():
        print(r["sm"], r["kernel"], r["registers"], r["shared"], r["spilled"], r["warps"])
    print(time.time() - t)
