"""latent_attention: one query per sequence over latents that all query heads share (MLA)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp import _C
from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops._splits import MIN_SPLIT, num_multiprocessors, plan_splits
from kvcomp.ops.decode_attention import attended, listed, logits_of

MOST_COLUMNS = 1024  # of a row
BLOCKS_PER_MULTIPROCESSOR = 2  # of the CUDA kernel, see latent_attention.cuh


def latent_attention(
    q: Tensor,
    latents: Tensor,
    seq_lens: Tensor,
    *,
    value_dim: int,
    scale: float,
    page_ids: Tensor | None = None,
    page_size: int = 1,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention in absorbed form: softmax(scale * q k^T) v, where a token's key
    is its whole latent row and its value the first `value_dim` columns of that row.

    There is one KV head. In DeepSeek-V3 a row has 512 latent and 64 rotated columns, and 128 query
    heads read it; a query is (q_nope W_UK, q_rot), and W_UV turns `out` into the head's output.

    Tokens are listed as in `decode_attention`: slots [0, seq_lens[b]), or the first seq_lens[b]
    tokens of the listed pages, where -1 skips a page. A row with nothing to attend to gives out = 0
    and lse = -inf.

    Args:
        q: [B, Hq, D]; fp32, fp16 or bf16; D a multiple of 16, at most 1024.
        latents: [B, T, D] of q's dtype, any strides on B and T, D contiguous.
        seq_lens: [B] int32, tokens attended, at most T (dense) or K * page_size (paged).
        value_dim: Dv, columns of a row that are its value, a multiple of 16, at most D.
        scale: factor on q k^T: of the heads before absorption, so that D does not tell it.
        page_ids: [B, 1, K] int32.
        page_size: tokens in a page.
        logits: optional output [B, Hq, N], N >= T (dense) or K * page_size (paged), of fp32 or,
            except on the CPU, fp16: receives the scaled logits of each attended position; others
            are left alone or set to -inf.

    Returns:
        out [B, Hq, Dv] of q's dtype, and lse [B, Hq] fp32, the natural log of the sum of exp.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout. Values of `seq_lens` and
            `page_ids` are checked on the CPU; on a GPU, where reading them would stall, an id out
            of range gives NaN.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
    """
    return _op(q, latents, seq_lens, page_ids, page_size, value_dim, scale, logits)


def reference(q, latents, seq_lens, page_ids, page_size, value_dim, scale, logits):
    rows = latents[:, None]
    k, v, valid = listed(rows, rows[..., :value_dim], seq_lens, page_ids, page_size)
    x = logits_of(q[:, None], k, scale).masked_fill(~valid[:, None, :, None], -torch.inf)
    out, lse = attended(x, v)
    if logits is not None:
        logits[..., : x.shape[-1]] = x.flatten(1, 3)
    return out.flatten(1, 2), lse.flatten(1, 2)


def takes(dim: int, value_dim: int) -> bool:
    """Whether rows of `dim` columns, the first `value_dim` of them the value, are of a size that
    attention is compiled for."""
    return dim % 16 == value_dim % 16 == 0 and value_dim <= dim <= MOST_COLUMNS


def fake(q, latents, seq_lens, page_ids, page_size, value_dim, scale, logits):
    out = q.new_empty(*q.shape[:-1], max(value_dim, 0))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def native(extension: ModuleType, backend: int) -> Callable:
    in_splits = backend == _C.Backend.cuda

    def run(q, latents, seq_lens, page_ids, page_size, value_dim, scale, logits):
        out, lse = fake(q, latents, seq_lens, page_ids, page_size, value_dim, scale, logits)
        partial_out, partial_lse, size = None, None, 0
        if in_splits:
            positions = latents.shape[1] if page_ids is None else page_ids.shape[2] * page_size
            splits, size = plan(q, value_dim, positions)
            if splits > 1:
                partial_lse = lse.new_empty(*lse.shape, splits)
                partial_out = lse.new_empty(*partial_lse.shape, value_dim)
        extension.latent_attention(
            *(backend, q, latents, seq_lens, page_ids, logits, out, lse, page_size, value_dim),
            *(scale, partial_out, partial_lse, size, raw_stream(q)),
        )
        return out, lse

    return run


def plan(q: Tensor, value_dim: int, positions: int) -> tuple[int, int]:
    """How many splits of how many positions the CUDA kernel makes."""
    heads = 32 if q.shape[2] <= 576 and value_dim <= 512 else 16  # of a block
    blocks = q.shape[0] * -(-q.shape[1] // heads)
    chunks = max(1, -(-positions // MIN_SPLIT))
    return plan_splits(blocks, chunks, num_multiprocessors(q.device) * BLOCKS_PER_MULTIPROCESSOR)


_op = bind(
    "latent_attention",
    "(Tensor q, Tensor latents, Tensor seq_lens, Tensor? page_ids, int page_size, int value_dim,"
    " float scale, Tensor(a!)? logits) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
