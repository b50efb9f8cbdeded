"""decode_attention: one query per sequence over all cached tokens, or over listed pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kvcomp import _C
from kvcomp.ops._arguments import default_scale
from kvcomp.ops._registry import bind, raw_stream
from kvcomp.ops._splits import MIN_SPLIT, num_multiprocessors, plan_splits
from kvcomp.ops.quantize_rows import dequantized

HEADS_PER_BLOCK = 8  # of the CUDA kernel, see decode_attention.cuh
NO_BOUND = 2**63 - 1  # max_len where the host knows none


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    *,
    page_ids: Tensor | None = None,
    page_size: int = 1,
    scale: float | None = None,
    logits: Tensor | None = None,
    words: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float | None = None,
    max_len: int | None = None,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence: softmax(scale * q k^T) v, grouped-query heads.

    Dense (no `page_ids`): row b attends to slots [0, seq_lens[b]). Paged: the listed pages, in
    order, form one sequence of tokens (page u holds slots [u * page_size, (u + 1) * page_size)),
    and row b attends to its first seq_lens[b] tokens. An id of -1 skips its page: the positions
    stay counted, nothing is attended. So the partial page of a sequence must be listed last,
    which is how a serving engine's block table and `select_pages` list it.

    With a table `page_ids` [B, K], K and V are a pool of pages that all sequences share,
    [pages, Hkv, P, D], in whatever order it lies in memory.

    A row with nothing to attend to gives out = 0 and lse = -inf, the neutral element of
    `merge_states`.

    Args:
        q: [B, Hq, D]; fp32, fp16 or bf16; D one of `HEAD_SIZES`.
        k, v: [B, Hkv, T, D] of q's dtype, or int8 with `words`; any strides on B, Hkv and T, D
            contiguous. Or a pool [pages, Hkv, P, D]: the stride of pages is a multiple of that of
            tokens, the same multiple for k and v. V has Dv columns: D, or another number where
            `UNLIKE_SIZES` has the two.
        seq_lens: [B] int32, tokens attended, at most T (dense) or K * page_size (paged).
        page_ids: [B, 1, K] (one set for all heads) or [B, Hkv, K], int32; [B, K] with a pool.
        page_size: tokens in a page: 1, 16, 32 or 64; any positive size works. P with a pool.
        scale: factor on q k^T; 1 / sqrt(D) by default.
        logits: optional output [B, Hq, N], N >= T (dense) or K * page_size (paged), of fp32 or,
            except on the CPU, fp16: receives the scaled logits of each attended position; other
            positions are left alone or set to -inf. In fp16 a logit below 2^k errs by at most
            2^(k - 12), and so, relatively, does the probability made of it (0.4 % at 16); finite
            ones beyond 65504 become that. `out` and `lse` are the same with either.
        words: [B, Hkv, T] int32, the scales of K and V in eight bits, k and v int8 then, as
            `quantize_rows` makes them. q takes part as integers of 14 bits and a sign, times the
            power of two that its largest element asks for: see `in_integers`.
        out, lse: where to write the results, contiguous; new tensors by default.
        softcap: logits become softcap * tanh(logit / softcap), as Gemma 2 has them, also those in
            `logits`. On a CPU and in Triton; CUDA kernels refuse it.
        max_len: a bound for seq_lens, when the host knows one. A GPU divides the tokens of a row by
            it, and otherwise by what there is room for, such as all of a wide block table. A longer
            row is an error on the CPU and NaN on a GPU.
        checked: that an earlier call has checked these seq_lens and this list, with K and V as
            large: as an engine's first layer has for all layers of a step. Only the lengths are
            then looked at again, and a wrong list may read any memory.

    Returns:
        out [B, Hq, Dv] of q's dtype, and lse [B, Hq] fp32, the natural log of the sum of exp.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout. Values of `seq_lens` and
            `page_ids` are checked on the CPU; on a GPU, where reading them would stall, an id out
            of range gives NaN.
    """
    if scale is None:
        scale = default_scale(q)
    made = _op(
        *(q, k, v, seq_lens, page_ids, page_size, scale, logits),
        *(words, out, lse, 0.0 if softcap is None else softcap),
        *(NO_BOUND if max_len is None else max_len, checked),
    )
    return given_or_made(out, lse, made)


def logits_dtype(q: Tensor) -> torch.dtype:
    """What to keep logits in for choosing by them: 16 bits beside 16-bit K and V on a GPU, where
    they cost bandwidth and err less than the rounding of K does; fp32 elsewhere."""
    return torch.float16 if q.is_cuda and q.dtype != torch.float32 else torch.float32


def room(q: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an op of attention returns for q [..., D] and v [..., Dv]: unwritten out and lse.

    It may not return what the caller gave, so it returns an empty tensor in the place of that.
    """
    if out is not None:
        made = q.new_empty(0)
    elif v.shape[-1:] == q.shape[-1:] and q.is_contiguous():
        made = torch.empty_like(q)
    else:
        made = q.new_empty(q.shape[:-1] + v.shape[-1:])
    return made, q.new_empty(q.shape[:-1] if lse is None else (0,), dtype=torch.float32)


def given_or_made(out: Tensor | None, lse: Tensor | None, made: tuple) -> tuple:
    """The op's results, with the caller's own out and lse where there are such."""
    if out is None and lse is None:
        return made
    return made[0] if out is None else out, made[1] if lse is None else lse, *made[2:]


def handed_over(
    made: tuple[Tensor, Tensor], out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a reference returns of out and lse, written where the caller wants them."""
    given = out, lse
    for value, into in zip(made, given, strict=True):
        if into is not None:
            into.copy_(value)
    first, second = (
        value if into is None else value.new_empty(0)
        for value, into in zip(made, given, strict=True)
    )
    return first, second


def optionals(words=None, out=None, lse=None, softcap=0.0, max_len=NO_BOUND, checked=False):
    """What ends the arguments of each op of attention, where it may have been left out."""
    return words, out, lse, softcap, max_len, checked


def reference(q, k, v, seq_lens, page_ids, page_size, scale, logits, *optional):
    words, out, lse, softcap, _, _ = optionals(*optional)
    q, k, v = decoded(q, k, v, words)
    k, v, valid = listed(k, v, seq_lens, page_ids, page_size)
    x = logits_of(q[:, None], k, scale, softcap).masked_fill(~valid[:, None, :, None], -torch.inf)
    if logits is not None:
        logits[..., : x.shape[-1]] = x.flatten(1, 3)
    made_out, made_lse = attended(x, v)
    return handed_over((made_out.flatten(1, 2), made_lse.flatten(1, 2)), out, lse)


def decoded(q, k, v, words):
    """q as it meets codes, and the rows that codes k, v stand for; all as they are without them."""
    if words is None:
        return q, k, v
    return in_integers(q), *dequantized(k, v, words, q.dtype)


def in_integers(q):
    """Rows of q rounded to multiples of 2^-14 of the power of two above their largest element; NaN
    where one is not finite."""
    top = q.abs().amax(-1, keepdim=True)
    above = torch.frexp(top.nan_to_num(posinf=0.0).clamp(min=2.0**-101)).exponent
    step = torch.ldexp(torch.ones_like(top), above - 14)
    return ((q / step).round() * step).masked_fill(~top.isfinite(), torch.nan)


def listed(k, v, seq_lens, page_ids, page_size):
    """K and V [B, Hkv, N, D] in the order in which they are listed, and which of them there are,
    [B, 1 or Hkv, N] bool; V is 0 where there is nothing."""
    if page_ids is not None and page_ids.ndim == 2:  # a pool of pages [pages, Hkv, P, D]
        shape = len(page_ids), -1, -1, -1
        k, v = (x.transpose(0, 1).flatten(1, 2).expand(shape) for x in (k, v))
        page_ids = page_ids[:, None]
    if page_ids is None:
        valid = torch.arange(k.shape[2], device=k.device) < seq_lens[:, None, None]
    else:
        offsets = torch.arange(page_size, device=k.device)
        slots = (page_ids.long()[..., None] * page_size + offsets).flatten(-2)  # [B, 1|Hkv, N]
        position = torch.arange(slots.shape[-1], device=k.device)
        valid = (slots >= 0) & (position < seq_lens[:, None, None])
        slots = slots.where(valid, 0).expand(-1, k.shape[1], -1)
        k, v = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return k, v.masked_fill(~valid[..., None], 0.0), valid  # it may never have been written


def logits_of(q, k, scale, softcap=0.0):
    """q [B, m, Hq, D], k [B, Hkv, N, D] -> [B, m, Hkv, G, N]."""
    grouped = q.unflatten(2, (k.shape[1], -1)).transpose(1, 2)  # [B, Hkv, m, G, D]
    x = grouped.flatten(2, 3) @ k.transpose(-1, -2) * scale
    if softcap:
        x = softcap * (x / softcap).tanh()
    return x.unflatten(2, grouped.shape[2:4]).transpose(1, 2)


def attended(x, v):
    """x [B, m, Hkv, G, N] logits, v [B, Hkv, N, D] -> out [B, m, Hq, D], lse [B, m, Hq]."""
    lse = x.logsumexp(-1)
    base = lse.masked_fill(lse == -torch.inf, 0.0)  # nothing attended: probabilities of 0
    probs = (x - base[..., None]).exp().transpose(1, 2)  # [B, Hkv, m, G, N]
    out = (probs.flatten(2, 3) @ v).unflatten(2, probs.shape[2:4]).transpose(1, 2)
    return out.flatten(2, 3), lse.flatten(2, 3)


def fake(q, k, v, seq_lens, page_ids, page_size, scale, logits, *optional):
    _, out, lse, *_ = optionals(*optional)
    return room(q, v, out, lse)


def native(extension: ModuleType, backend: int) -> Callable:
    in_splits = backend == _C.Backend.cuda

    def run(q, k, v, seq_lens, page_ids, page_size, scale, logits, *optional):
        words, out, lse, softcap, max_len, checked = optionals(*optional)
        made = room(q, v, out, lse)
        out, lse = given_or_made(out, lse, made)
        partial_out, partial_lse, size = None, None, 0
        if in_splits:
            partial_out, partial_lse, size = partials(q, k, v, lse, page_ids, page_size, max_len)
        extension.decode_attention(
            *(backend, q, k, v, seq_lens, page_ids, logits, out, lse, page_size, scale),
            *(partial_out, partial_lse, size, words, softcap, max_len, checked, raw_stream(q)),
        )
        return made

    return run


def partials(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    page_ids: Tensor | None,
    page_size: int,
    max_len: int,
) -> tuple[Tensor | None, Tensor | None, int]:
    """Room for out and lse of the CUDA kernel's splits, None where it makes but one; their size.

    q [B, Hq, D] or [B, m, Hq, D]: the splits are the same for any m.
    """
    positions = k.shape[2] if page_ids is None else page_ids.shape[-1] * page_size
    splits, size = plan(q, k, v, min(positions, max_len))
    if splits == 1:
        return None, None, size
    partial_lse = lse.new_empty(*lse.shape, splits)
    return lse.new_empty(*partial_lse.shape, v.shape[-1]), partial_lse, size


def plan(q: Tensor, k: Tensor, v: Tensor, positions: int) -> tuple[int, int]:
    """How many splits of how many positions the CUDA kernel makes."""
    group = q.shape[-2] // k.shape[1]
    blocks = q.shape[0] * k.shape[1] * -(-group // HEADS_PER_BLOCK)
    chunks = max(1, -(-positions // MIN_SPLIT))
    resident = blocks_per_multiprocessor(k.device, k.dtype, k.shape[-1], v.shape[-1])
    return plan_splits(blocks, chunks, num_multiprocessors(q.device) * resident)


@cache
def blocks_per_multiprocessor(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int
) -> int:
    """Blocks of the CUDA kernel that run there at once; where there is no GPU, as on Ampere."""
    if device.type != "cuda":
        return 2
    k, v = (torch.empty(size, dtype=dtype, device=device) for size in (head_dim, value_dim))
    return _C.decode_attention_blocks(k, v)


_op = bind(
    "decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor seq_lens, Tensor? page_ids, int page_size, float scale,"
    " Tensor(a!)? logits, Tensor? words=None, Tensor(b!)? out=None, Tensor(c!)? lse=None,"
    f" float softcap=0.0, int max_len={NO_BOUND}, bool checked=False)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
