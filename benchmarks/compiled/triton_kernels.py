"""The Triton kernels compiled ahead of time, without a GPU: what each takes on each architecture.

A kernel enters with one line in CALLS, the arguments of its op's launch(): the configurations
compiled are those that launch() chooses. Needs Triton without its interpreter, so a process whose
TRITON_INTERPRET is not 1.
"""

from __future__ import annotations

import importlib
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch

from compiled.cubins import Kernel, read_usage

# Compute capability -> bytes of shared memory that one block may ask for. 8.0 stands for 8.6, 8.9
# and 12.0, which are given the same kernels and have less room than the 163 KB of 8.0.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, INT32, INT64 = torch.int8, torch.int32, torch.int64


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")  # launch() looks at shapes only


LENS = empty(2, dtype=INT32)


def attention(dtype, head_dim, group=4, page_size=0, logits=None, value_dim=None):
    """Arguments of decode_attention, two KV heads; page_size 0 is dense."""
    k, v = (empty(2, 2, 16384, x, dtype=dtype) for x in (head_dim, value_dim or head_dim))
    ids = empty(2, 2, 4096 // page_size, dtype=INT32) if page_size else None
    side = None if logits is None else empty(2, 2 * group, 16384, dtype=logits)
    q = empty(2, 2 * group, head_dim, dtype=dtype)
    return q, k, v, LENS, ids, max(page_size, 1), head_dim**-0.5, side


def selected(pages):
    """Arguments of select_pages, one set of 64."""
    return empty(2, 1, pages), LENS, 16, 64, 8, 0


LISTED = empty(2, 1, 64, dtype=INT32)  # their pages


def stored(dtype, heads, head_dim):
    """Arguments of store_slots."""
    rows, pool = empty(8, heads, head_dim, dtype=dtype), empty(99, heads, 16, head_dim, dtype=dtype)
    return rows, rows, pool, pool, empty(8, dtype=INT64)


def coded(arguments):
    """Arguments of an attention op with its K and V in eight bits."""
    q, kv = arguments[:2]
    codes = empty(*kv.shape, dtype=INT8)
    return q, codes, codes, *arguments[3:], empty(*kv.shape[:3], dtype=INT32)


def made(dtype, head_dim, turn):
    """Arguments of quantize_rows."""
    rows, codes = (empty(2, 8, 4096, head_dim, dtype=x) for x in (dtype, INT8))
    return rows, rows, codes, codes, empty(2, 8, 4096, dtype=INT32), turn


def appended(dtype, head_dim, count, group=4, page_size=0, logits=None, tree=False):
    """Arguments of append_attention; all rows have all m queries unless there is a tree."""
    q, k, v, lens, ids, size, scale, side = attention(dtype, head_dim, group, page_size, logits)
    q = q[:, None].expand(-1, count, -1, -1)
    side = None if side is None else side[:, None].expand(-1, count, -1, -1)
    tail = empty(2, count, dtype=INT64) if tree else None
    return q, k, v, lens, LENS if tree else None, tail, ids, size, scale, side


def sides(dtype, head_dim):
    """Arguments of merge_states."""
    return 2 * (empty(2, 32, head_dim, dtype=dtype), empty(2, 32))


def scored(page_size, num_groups, use_max, dtype=FP32):
    """Arguments of page_scores."""
    return empty(2, 32, 16384, dtype=dtype), empty(2, 32), LENS, page_size, num_groups, use_max


def turned(dtype, head_dim, rotated):
    """Arguments of rotate_keys."""
    return empty(2, 8, 16384, head_dim, dtype=dtype), *2 * (empty(2, rotated // 2),)


def clustered(dtype, head_dim):
    """Arguments of kmeans."""
    return empty(2, 8, 32768, head_dim, dtype=dtype), LENS, LENS, 16, 8192, 1


def latents(dtype, dim, value_dim, heads=128, page_size=0, logits=None):
    """Arguments of latent_attention; page_size 0 is dense."""
    q, rows = empty(2, heads, dim, dtype=dtype), empty(2, 16384, dim, dtype=dtype)
    ids = empty(2, 1, 4096 // page_size, dtype=INT32) if page_size else None
    side = None if logits is None else empty(2, heads, 16384, dtype=logits)
    return q, rows, LENS, ids, max(page_size, 1), value_dim, dim**-0.5, side


def units(dtype, head_dim, group=4):
    """Arguments of unit_scores, two KV heads."""
    q = empty(2, 2 * group, head_dim, dtype=dtype)
    centroids = empty(2, 2, 16384, head_dim, dtype=dtype)
    return q, centroids, empty(2, 2, 16385, dtype=INT32), LENS, LENS, head_dim**-0.5


# (op, what is special about the call, arguments of launch)
CALLS = [
    ("decode_attention", "bf16 D32", attention(BF16, 32)),
    ("decode_attention", "bf16 D64", attention(BF16, 64)),
    ("decode_attention", "bf16 D80 logits", attention(BF16, 80, logits=FP32)),
    ("decode_attention", "bf16 D96 page 1", attention(BF16, 96, page_size=1)),
    ("decode_attention", "bf16 D128", attention(BF16, 128)),
    ("decode_attention", "bf16 D128 logits fp16", attention(BF16, 128, logits=FP16)),
    ("decode_attention", "bf16 D128 page 16", attention(BF16, 128, page_size=16)),
    ("decode_attention", "bf16 D128 page 64", attention(BF16, 128, page_size=64)),
    ("decode_attention", "bf16 D128 G 40", attention(BF16, 128, group=40)),
    ("decode_attention", "bf16 D192 Dv128", attention(BF16, 192, value_dim=128)),
    ("decode_attention", "bf16 D256", attention(BF16, 256)),
    ("decode_attention", "bf16 D256 page 16 G 40", attention(BF16, 256, 40, page_size=16)),
    ("decode_attention", "fp16 D64 page 16", attention(FP16, 64, page_size=16)),
    ("decode_attention", "fp16 D128", attention(FP16, 128)),
    ("decode_attention", "fp32 D64 G 1", attention(FP32, 64, group=1)),
    ("decode_attention", "fp32 D128 logits", attention(FP32, 128, logits=FP32)),
    ("decode_attention", "fp32 D256 page 16 G 40", attention(FP32, 256, 40, page_size=16)),
    ("decode_attention", "codes bf16 D64", coded(attention(BF16, 64))),
    ("decode_attention", "codes bf16 D128", coded(attention(BF16, 128))),
    ("decode_attention", "codes bf16 D128 page 16", coded(attention(BF16, 128, page_size=16))),
    ("decode_attention", "codes fp16 D256 logits", coded(attention(FP16, 256, logits=FP16))),
    ("decode_attention", "codes fp32 D128", coded(attention(FP32, 128))),
    ("append_attention", "bf16 D64 m 4", appended(BF16, 64, 4)),
    ("append_attention", "bf16 D128 m 8 page 16", appended(BF16, 128, 8, page_size=16)),
    ("append_attention", "bf16 D128 m 64 tree", appended(BF16, 128, 64, tree=True)),
    ("append_attention", "fp16 D80 m 2 logits", appended(FP16, 80, 2, logits=FP32)),
    ("append_attention", "bf16 D256 m 8 tree", appended(BF16, 256, 8, page_size=16, tree=True)),
    ("append_attention", "fp32 D64 m 8 tree", appended(FP32, 64, 8, tree=True)),
    ("append_attention", "fp32 D128 m 8 tree", appended(FP32, 128, 8, page_size=16, tree=True)),
    ("append_attention", "fp32 D256 m 4 tree", appended(FP32, 256, 4, tree=True)),
    ("latent_attention", "bf16 576", latents(BF16, 576, 512)),
    ("latent_attention", "bf16 576 page 1", latents(BF16, 576, 512, page_size=1)),
    ("latent_attention", "bf16 576 H 16 logits", latents(BF16, 576, 512, 16, 64, FP16)),
    ("latent_attention", "fp16 288 H 40", latents(FP16, 288, 256, 40, logits=FP32)),
    ("latent_attention", "bf16 1024", latents(BF16, 1024, 1024)),
    ("latent_attention", "fp32 576 page 16", latents(FP32, 576, 512, page_size=16)),
    ("append_attention", "codes bf16 D128 m 8", coded(appended(BF16, 128, 8, page_size=16))),
    ("append_attention", "codes bf16 D128 tree", coded(appended(BF16, 128, 64, tree=True))),
    ("append_attention", "codes fp32 D128 tree", coded(appended(FP32, 128, 8, tree=True))),
    ("hadamard", "bf16 D128", (empty(2, 32, 128, dtype=BF16),)),
    ("hadamard", "fp32 D512", (empty(2, 32, 512),)),
    ("quantize_rows", "bf16 D128 turned", made(BF16, 128, True)),
    ("quantize_rows", "fp16 D80", made(FP16, 80, False)),
    ("merge_states", "bf16 D80", sides(BF16, 80)),
    ("merge_states", "fp16 D128", sides(FP16, 128)),
    ("merge_states", "fp32 D256", sides(FP32, 256)),
    ("page_scores", "max page 16", scored(16, 1, True)),
    ("page_scores", "sum page 1", scored(1, 8, False)),
    ("page_scores", "max page 2000", scored(2000, 8, True)),
    ("page_scores", "fp16 max page 16", scored(16, 1, True, FP16)),
    ("rotate_keys", "bf16 D128", turned(BF16, 128, 128)),
    ("rotate_keys", "fp16 D80 R 32", turned(FP16, 80, 32)),
    ("rotate_keys", "fp32 D256", turned(FP32, 256, 256)),
    ("select_pages", "P 100", (empty(2, 8, 100), LENS, 16, 64, 8, 0)),
    ("select_pages", "P 1024", selected(1024)),
    ("select_pages", "P 128K", (empty(2, 8, 1 << 17), LENS, 1, 2048, 128, 4)),
    ("select_pages", "P 1024 table", (*selected(1024), empty(2, 1024, dtype=INT32), LISTED)),
    ("store_slots", "bf16 D128", stored(BF16, 8, 128)),
    ("store_slots", "fp32 D256 H 32", stored(FP32, 32, 256)),
    ("kmeans", "bf16 D128", clustered(BF16, 128)),
    ("kmeans", "bf16 D256", clustered(BF16, 256)),
    ("kmeans", "fp16 D80", clustered(FP16, 80)),
    ("kmeans", "fp32 D128", clustered(FP32, 128)),
    ("kmeans", "fp32 D256", clustered(FP32, 256)),
    ("query_similarity", "bf16 D128", 2 * (empty(2, 32, 128, dtype=BF16),)),
    ("query_similarity", "fp16 D80 H 28", 2 * (empty(2, 28, 80, dtype=FP16),)),
    ("query_similarity", "fp32 D512", 2 * (empty(2, 32, 512),)),
    ("unit_scores", "bf16 D128", units(BF16, 128)),
    ("unit_scores", "bf16 D80 G 40", units(BF16, 80, group=40)),
    ("unit_scores", "fp16 D512", units(FP16, 512)),
    ("unit_scores", "fp32 D128 G 1", units(FP32, 128, group=1)),
    ("unit_scores", "fp32 D256 G 40", units(FP32, 256, group=40)),
]


def triton_kernels() -> list[Kernel]:
    """One per architecture and distinct kernel, compiled on two cores."""
    jobs = [(sm, part) for sm in SHARED_LIMIT for part in range(4)]
    with ProcessPoolExecutor(2) as pool:
        return [one for part in pool.map(compile_part, *zip(*jobs, strict=True)) for one in part]


def compile_part(capability: int, part: int) -> list[Kernel]:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    kernels = []
    for kernel, call, source, options in recorded_launches()[part::4]:
        compiled = triton.compile(source, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            (used,) = read_usage(Path(file.name))
        shared = compiled.metadata.shared  # all of it is asked for at launch
        kernels.append(
            Kernel(f"{kernel}, {call}", f"sm_{capability}", used.registers, shared, used.spilled)
        )
    return kernels


@cache
def recorded_launches() -> list[tuple]:
    """(kernel, call, source, options) of each distinct kernel that the calls launch."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launches = []
    JITFunction.run = lambda kernel, *args, **keywords: launches.append((kernel, args, keywords))
    found = {}
    for op, call, args in CALLS:
        importlib.import_module(f"kvcomp.ops.triton.{op}").launch(*args)
        for kernel, values, keywords in launches:
            signature, constants, hints = specialize(kernel, values, keywords)
            names = set(keywords) - set(kernel.arg_names) - {"grid", "warmup"}
            options = {name: keywords[name] for name in sorted(names)}
            source = ASTSource(kernel, signature, constants, hints)
            key = (kernel.__name__, str(signature), str(constants), str(hints), str(options))
            found.setdefault(key, (kernel.__name__, call, source, options))
        launches.clear()
    return list(found.values())


DIVISIBLE = [["tt.divisibility", 16]]


def specialize(kernel, values, keywords) -> tuple[dict, dict, dict]:
    """What Triton's launcher derives from arguments: types, constants, which divide by 16."""
    pointers = {
        BF16: "*bf16",
        FP16: "*fp16",
        FP32: "*fp32",
        INT8: "*i8",
        INT32: "*i32",
        INT64: "*i64",
    }
    bound = {**keywords, **dict(zip(kernel.arg_names, values, strict=False))}
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name], hints[(index,)] = pointers[value.dtype], DIVISIBLE
            continue
        by_value = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (by_value and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if by_value and value % 16 == 0:
            hints[(index,)] = DIVISIBLE
    return signature, constants, hints
