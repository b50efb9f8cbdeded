"""What else attends on a GPU: SDPA by each of its backends, FlexAttention, flash-attn, FlashInfer.

Each attends to all of K and V, in the way that suits it best. What is not installed, or refuses
the shape, is left out and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ops.common import PAGE

if TYPE_CHECKING:
    from ops.attention import Attention, Shape

WORKSPACE = 128 << 20  # bytes, FlashInfer's own advice


def sdpa_by(backend: SDPBackend, shape: Shape, x: Attention) -> Tensor:
    """The queries of a KV head as if they were one sequence's: K and V are read once for all."""
    q = x.q.view(shape.batch, shape.kv_heads, -1, shape.dim)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, x.k, x.v, scale=shape.scale).view_as(x.q)


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # compiled before the first sample


def flex(shape: Shape, x: Attention) -> Tensor:
    attend = _compiled_flex()
    return attend(x.q[:, :, None], x.k, x.v, scale=shape.scale, enable_gqa=True)[:, :, 0]


def flash_attn_2(shape: Shape, x: Attention) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return _flash_attn(flash_attn_with_kvcache, shape, x)


def flash_attn_3(shape: Shape, x: Attention) -> Tensor:
    from flash_attn_interface import flash_attn_with_kvcache

    return _flash_attn(flash_attn_with_kvcache, shape, x)


def _flash_attn(attend: Callable, shape: Shape, x: Attention) -> Tensor:
    k, v = x.k.transpose(1, 2), x.v.transpose(1, 2)  # [B, T, Hkv, D]
    out = attend(x.q[:, None], k, v, cache_seqlens=x.lens, softmax_scale=shape.scale)
    return (out[0] if isinstance(out, tuple) else out)[:, 0]


def flashinfer(tensor_cores: bool, shape: Shape, x: Attention) -> Tensor:
    """Its decode wrapper, planned once; the prefill one would be several times slower."""
    wrapper = _planned_wrapper(tensor_cores, shape, x.q.device)
    return wrapper.run(x.q, (in_pages(shape, x.k), in_pages(shape, x.v)))


@cache
def _planned_wrapper(tensor_cores: bool, shape: Shape, device: torch.device) -> object:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    pages = shape.tokens // PAGE
    wrapper.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages,
        page_table(shape, device).flatten(),
        torch.full((shape.batch,), PAGE, dtype=torch.int32, device=device),
        shape.heads,
        shape.kv_heads,
        shape.dim,
        PAGE,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        sm_scale=shape.scale,
    )
    return wrapper


def in_pages(shape: Shape, x: Tensor) -> Tensor:
    """K or V [B, Hkv, T, D] as pages [N, Hkv, PAGE, D], not copied: pages that start in other heads
    are counted too, and no table names them."""
    per_head = shape.tokens // PAGE
    count = ((shape.batch - 1) * shape.kv_heads + 1) * per_head
    strides = PAGE * shape.dim, shape.tokens * shape.dim, shape.dim, 1
    return x.as_strided((count, shape.kv_heads, PAGE, shape.dim), strides)


def page_table(shape: Shape, device: torch.device) -> Tensor:
    """[B, T / PAGE] int32 of `in_pages`."""
    per_head = shape.tokens // PAGE
    first = torch.arange(shape.batch, device=device)[:, None] * shape.kv_heads * per_head
    return (first + torch.arange(per_head, device=device)).int()


GPU_BASELINES: dict[str, Callable] = {
    "sdpa-flash": partial(sdpa_by, SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": partial(sdpa_by, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": partial(sdpa_by, SDPBackend.CUDNN_ATTENTION),
    "sdpa-math": partial(sdpa_by, SDPBackend.MATH),
    "flex": flex,
    "flash-attn-2": flash_attn_2,
    "flash-attn-3": flash_attn_3,
    "flashinfer": partial(flashinfer, False),
    "flashinfer-tc": partial(flashinfer, True),
}


def usable(baselines: dict[str, Callable], shape: Shape, x: Attention) -> dict[str, Callable]:
    """Those that run on these inputs; a line on standard error for each that does not."""
    found = {}
    for name, call in baselines.items():
        try:
            call(shape, x)
        except Exception as problem:  # whatever a library raises
            reason = (str(problem).strip() or repr(problem)).splitlines()[0]
            print(f"{name}: left out, {reason}", file=sys.stderr)
        else:
            found[name] = call
    return found
