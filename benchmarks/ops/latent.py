"""latent_attention: the op against matrix products of its size, and a layer's decode step against
the layer of transformers, which expands K and V of all tokens in every step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp.hf.latent import Latents
from kvcomp.ops import OPS
from ops.common import DTYPES, PEAK


class Sizes(NamedTuple):
    heads: int
    rank: int
    rotated: int
    head_dim: int  # of K without its rotated part, and of V

    @property
    def scale(self) -> float:
        return (self.head_dim + self.rotated) ** -0.5

    def __str__(self) -> str:
        return f"{self.heads}x{self.rank}+{self.rotated}"


MODELS = Sizes(128, 512, 64, 128), Sizes(16, 512, 64, 128)  # DeepSeek-V3, and V2-Lite
SMOKE = (Sizes(4, 32, 16, 32),)


class Inputs(NamedTuple):
    query: Tensor  # [1, H, 1, head_dim + rotated]
    rows: Tensor  # [1, T, rank + rotated]
    lens: Tensor


def bench_latent_attention(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    for sizes in SMOKE if options.smoke else MODELS:
        for tokens in options.tokens:
            for dtype in options.dtype:
                yield _bench(sizes, tokens, dtype, run)


def _bench(sizes: Sizes, tokens: int, dtype: str, run: Settings) -> list[Row]:
    layer = _layer(sizes, dtype, run.device)
    moved = tokens * (sizes.rank + sizes.rotated) * DTYPES[dtype].itemsize
    sets = [_inputs(sizes, tokens, dtype, run.device) for _ in range(run.num_sets(moved))]
    contenders = list(_contenders(sizes, layer, sets[0], moved, run.device))
    shape = f"{sizes} n={tokens}"
    return measure("latent_attention", shape, dtype, sets, contenders, run)


def _layer(sizes: Sizes, dtype: str, device: str) -> Any:
    """Attention of DeepSeek-V3, behind a narrow model."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=64,
        q_lora_rank=None,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        kv_lora_rank=sizes.rank,
        qk_rope_head_dim=sizes.rotated,
        qk_nope_head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
    )
    return DeepseekV3Attention(config, 0).to(device, DTYPES[dtype]).requires_grad_(False)


def _inputs(sizes: Sizes, tokens: int, dtype: str, device: str) -> Inputs:
    query = torch.randn(1, sizes.heads, 1, sizes.head_dim + sizes.rotated, device=device) * PEAK
    rows = torch.randn(1, tokens, sizes.rank + sizes.rotated, device=device)
    lens = torch.full((1,), tokens, dtype=torch.int32, device=device)
    return Inputs(query.to(DTYPES[dtype]), rows.to(DTYPES[dtype]), lens)


def _contenders(
    sizes: Sizes, layer: Any, x: Inputs, moved: int, device: str
) -> Iterator[Contender]:
    latents, rank = Latents(layer), sizes.rank

    def stock(x: Inputs) -> Tensor:
        """What a layer of transformers does with what its cache holds."""
        key, value = layer.expand_kv(x.rows[:, None, :, :rank], x.rows[:, None, :, rank:])
        return F.scaled_dot_product_attention(x.query, key, value, scale=sizes.scale)[:, :, 0]

    def op(impl: str, x: Inputs, q: Tensor) -> Tensor:
        call = OPS["latent_attention"].impls[impl]
        return call(q, x.rows, x.lens, None, 1, rank, sizes.scale, None)[0]

    def products(x: Inputs) -> Tensor:
        """q k^T and p v without a softmax."""
        logits = absorbed[0] @ x.rows[0].T
        return logits @ x.rows[0, :, :rank]

    def sdpa(x: Inputs) -> Tensor:
        k, q = x.rows[:, None], absorbed[:, :, None]
        v = k[..., :rank]
        return F.scaled_dot_product_attention(q, k, v, scale=sizes.scale, enable_gqa=True)[:, :, 0]

    def right(query: Tensor, rows: Tensor, lens: Tensor, weight: Tensor) -> Tensor:
        """A layer's step in absorbed form, in any precision."""
        w_uk, w_uv = weight.unflatten(0, (sizes.heads, -1)).split(sizes.head_dim, 1)
        nope, rotated = query[:, :, 0].split((sizes.head_dim, sizes.rotated), 2)
        q = torch.cat([torch.einsum("bhd,hdr->bhr", nope, w_uk), rotated], 2)
        given = q, rows, lens, None, 1, rank, sizes.scale, None
        out = OPS["latent_attention"].reference(*given)[0]
        return torch.einsum("bhr,hdr->bhd", out, w_uv)

    absorbed = latents.absorb(x.query)[:, :, 0]  # of the op, every time
    args = absorbed, x.rows, x.lens, None, 1, rank, sizes.scale, None
    expected = Expected(OPS["latent_attention"].reference, args)
    of_layer = Expected(right, (*x, layer.kv_b_proj.weight))
    yield Contender("matmul", products, moved, ours=False)
    yield Contender("sdpa-gqa", sdpa, moved, expected=expected, ours=False)
    yield Contender("transformers", stock, moved, "layer", of_layer, ours=False)
    for impl in implementations("latent_attention", device, moved):
        kernel = impl != "reference"
        against = (Against("matmul", "matmul"), Against("sdpa-gqa", "sdpa-gqa")) if kernel else ()
        yield Contender(
            impl,
            lambda x, impl=impl: op(impl, x, absorbed),
            moved,
            expected=expected,
            against=against,
        )
        if kernel:
            yield Contender(
                impl,
                lambda x, impl=impl: latents.project(op(impl, x, latents.absorb(x.query)[:, :, 0])),
                moved,
                "layer",
                of_layer,
                against=(Against("transformers", "transformers layer"),),
            )
