"""decode_attention and merge_states."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from ops.common import DTYPES, PAGE, PEAK, empty_logits, plain_contenders
from ops.gpu_baselines import GPU_BASELINES, usable

RECENT = 8  # pages, DELTA's default

# --- decode_attention -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"B={self.batch} {self.heads}/{self.kv_heads}x{self.dim} n={self.tokens}"

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def kv_bytes(self, tokens: int) -> int:
        """Of K and V together, for `tokens` tokens summed over the batch."""
        return 2 * tokens * self.kv_heads * self.dim * self.dtype.itemsize


class Attention(NamedTuple):
    """One set of inputs. K, V and logits are shared by several sets that differ in their lists."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_by_token: Tensor  # the same K and V, the heads of a token side by side
    v_by_token: Tensor
    lens: Tensor  # all of n
    ragged: Tensor  # 0.25 to 1 n
    selected: Tensor  # all of the tokens listed in `pages` or `tokens`
    all_pages: Tensor
    pages: Tensor  # [B, 1, k / 16], one list for all heads
    tokens: Tensor  # [B, Hkv, k], one list per KV head
    logits: Tensor


def attention_sets(
    shape: Shape, budget: int, run: Settings, copies: int | None = None
) -> list[Attention]:
    """Cold sets: enough copies of K and V, and lists that divide the tokens among them.

    The lists of one K and V are disjoint, so that all lists together touch all of it, and sets
    of the same K and V are not neighbours.

    copies: how many, where K and V themselves do not decide what is enough.
    """
    generator = torch.Generator(run.device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=run.device)
    kv_shape = (shape.batch, shape.kv_heads, shape.tokens, shape.dim)
    first = random(kv_shape, dtype=shape.dtype), random(kv_shape, dtype=shape.dtype)
    count = copies or run.num_sets(shape.kv_bytes(shape.batch * shape.tokens))
    kv = [first] + [(first[0].clone(), first[1].clone()) for _ in range(count - 1)]
    by_token = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in c) for c in kv]
    one = torch.empty(shape.batch, shape.heads, 1, dtype=shape.dtype, device=run.device)
    logits = [empty_logits(one, shape.tokens) for _ in kv]
    integers = partial(torch.tensor, dtype=torch.int32, device=run.device)
    same = {
        "lens": integers([shape.tokens] * shape.batch),
        "ragged": integers(ragged_lens(shape)),
        "selected": integers([budget] * shape.batch),
        "all_pages": torch.arange(shape.tokens // PAGE, dtype=torch.int32, device=run.device)
        .expand(shape.batch, 1, -1)
        .contiguous(),
    }
    page_lists = _disjoint_lists(shape.batch, 1, shape.tokens // PAGE, budget // PAGE, run.device)
    token_lists = _disjoint_lists(shape.batch, shape.kv_heads, shape.tokens, budget, run.device)
    return [
        Attention(
            q=(random(shape.batch, shape.heads, shape.dim) * PEAK).to(shape.dtype),
            k=k,
            v=v,
            k_by_token=k_by_token,
            v_by_token=v_by_token,
            pages=pages,
            tokens=tokens,
            logits=buffer,
            **same,
        )
        for pages, tokens in zip(page_lists, token_lists, strict=True)
        for (k, v), (k_by_token, v_by_token), buffer in zip(kv, by_token, logits, strict=True)
    ]


def ragged_lens(shape: Shape) -> list[int]:
    """From a quarter of n to n, as in a batch whose sequences started at different times."""
    steps = max(1, shape.batch - 1)
    return [shape.tokens * (steps + 3 * row) // (4 * steps) for row in range(shape.batch)]


def _disjoint_lists(batch: int, lists: int, total: int, count: int, device: str) -> list[Tensor]:
    """Random ascending lists [batch, lists, count] of 0..total-1 that share nothing."""
    generator = torch.Generator(device).manual_seed(1)
    order = torch.rand(batch, lists, total, generator=generator, device=device).argsort(-1).int()
    chunks = order[..., : total // count * count].split(count, dim=-1)
    return [chunk.sort(-1).values.contiguous() for chunk in chunks]


def sdpa_gqa(shape: Shape, x: Attention) -> Tensor:
    return _sdpa(shape, x.q, x.k, x.v)


def sdpa_repeat_kv(shape: Shape, x: Attention) -> Tensor:
    """What Hugging Face models do where grouped queries are not passed on."""
    group = shape.heads // shape.kv_heads
    k, v = (
        t[:, :, None].expand(-1, -1, group, -1, -1).reshape(shape.batch, shape.heads, -1, shape.dim)
        for t in (x.k, x.v)
    )
    return F.scaled_dot_product_attention(x.q[:, :, None], k, v, scale=shape.scale)[:, :, 0]


def grouped_bmm(shape: Shape, x: Attention) -> Tensor:
    """By hand: a KV head's queries as the rows of one matrix product, softmax in fp32."""
    q = x.q.view(shape.batch, shape.kv_heads, -1, shape.dim)
    probs = ((q @ x.k.transpose(-1, -2)).float() * shape.scale).softmax(-1)
    return (probs.to(x.v.dtype) @ x.v).view_as(x.q)


def gather_tokens(shape: Shape, x: Attention) -> Tensor:
    index = x.tokens.long()[..., None].expand(-1, -1, -1, shape.dim)
    return _sdpa(shape, x.q, x.k.gather(2, index), x.v.gather(2, index))


def gather_pages(shape: Shape, x: Attention) -> Tensor:
    """A copy of the pages, then SDPA; for one sequence, where torch has a quick way to copy."""
    k, v = (t.unflatten(2, (-1, PAGE)).index_select(2, x.pages[0, 0]) for t in (x.k, x.v))
    return _sdpa(shape, x.q, k.flatten(2, 3), v.flatten(2, 3))


def _sdpa(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, scale=shape.scale, enable_gqa=True)
    return out[:, :, 0]


DENSE_BASELINES = {"sdpa-gqa": sdpa_gqa, "sdpa-repeat-kv": sdpa_repeat_kv, "bmm": grouped_bmm}
SPARSE_BASELINES = {"pages": gather_pages, "tokens": gather_tokens}


@dataclass(frozen=True)
class Variant:
    """A way to call the op: which of the inputs it takes, and what that must move."""

    name: str  # "" for dense
    num_bytes: int
    lens: str = "lens"
    pages: str | None = None
    page_size: int = 1
    token_major: bool = False
    logits: bool = False
    select: int = 0  # a layer of DELTA that selects so many pages by these logits
    ideal: float = 1.0  # the bytes of dense over the bytes of this


def variants(shape: Shape, budget: int, logits: int) -> list[Variant]:
    """logits: bytes of the buffer for them."""
    tokens = shape.batch * shape.tokens
    dense = shape.kv_bytes(tokens)
    paged = {"pages": "all_pages", "page_size": PAGE}
    select = min(budget, shape.tokens) // PAGE
    table = [
        Variant("", dense),
        Variant(f"pages{PAGE} all", dense + 4 * tokens // PAGE, **paged),
        Variant("with logits", dense + logits, logits=True),
        Variant("delta layer", dense + 2 * logits, logits=True, select=select),
    ]
    if shape.batch > 1:
        used = sum(ragged_lens(shape))
        table.append(Variant("ragged", shape.kv_bytes(used), "ragged", ideal=tokens / used))
    if budget < shape.tokens:
        listed, ideal = shape.batch * budget, shape.tokens / budget
        by_page = shape.kv_bytes(listed) + 4 * listed // PAGE
        by_token = shape.kv_bytes(listed) + 4 * listed * shape.kv_heads
        table += [
            Variant(f"pages{PAGE} k={budget}", by_page, "selected", "pages", PAGE, ideal=ideal),
            Variant(
                f"pages{PAGE} k={budget} token-major",
                by_page,
                "selected",
                "pages",
                PAGE,
                token_major=True,
                ideal=ideal,
            ),
            Variant(f"tokens k={budget}", by_token, "selected", "tokens", ideal=ideal),
        ]
    return table


def attend(use: dict[str, Callable], shape: Shape, variant: Variant, x: Attention) -> tuple:
    """Call the variant with the implementations to `use`, by op."""
    lens, page_ids = getattr(x, variant.lens), variant.pages and getattr(x, variant.pages)
    logits = x.logits if variant.logits else None
    k, v = (x.k_by_token, x.v_by_token) if variant.token_major else (x.k, x.v)
    if variant.select:
        chosen = PAGE, variant.select, shape.scale, logits, 1, True, min(RECENT, variant.select), 0
        out, lse, _, page_ids, _ = use["attend_and_select"](x.q, k, v, lens, None, *chosen)
        return out, lse, logits, page_ids
    out, lse = use["decode_attention"](
        x.q, k, v, lens, page_ids, variant.page_size, shape.scale, logits
    )
    return (out, lse, logits) if variant.logits else (out, lse)


def attention_contenders(
    shape: Shape, budget: int, x: Attention, device: str
) -> Iterator[Contender]:
    """Baselines, then each implementation: dense, and its variants against its own dense."""
    table = variants(shape, budget, x.logits.nbytes)
    expected = _expectations(shape, table, x)
    dense = table[0].num_bytes
    baselines = DENSE_BASELINES
    if device == "cuda":
        baselines = baselines | usable(GPU_BASELINES, shape, x)
    for name, baseline in baselines.items():
        yield Contender(name, partial(baseline, shape), dense, "", expected[""], ours=False)
    sparse = ("tokens", "pages") if shape.batch == 1 else ("tokens",)
    gathered = {v.name for v in table if v.pages in sparse and not v.token_major}
    for v in table:
        if v.name in gathered:
            call = partial(SPARSE_BASELINES[v.pages], shape)
            yield Contender("gather-sdpa", call, v.num_bytes, v.name, expected[v.name], ours=False)
    for name in implementations("decode_attention", device, dense):
        use = {
            op: choice.impls.get(name) or choice.impls[choice.bound[device]]
            for op, choice in OPS.items()
        }
        for v in table[:1] if name == "reference" else table:
            against = []
            if v.name:
                against.append(Against("own-dense", name, v.ideal))
            elif name != "reference":
                against += [Against(baseline, baseline) for baseline in baselines]
            if v.name in gathered:
                against.append(Against("gather-sdpa", f"gather-sdpa {v.name}"))
            call = partial(attend, use, shape, v)
            yield Contender(
                name, call, v.num_bytes, v.name, expected[v.name], against=tuple(against)
            )


def _expectations(shape: Shape, table: list[Variant], x: Attention) -> dict[str, Expected]:
    """By variant. All that attend to all tokens share the one that returns most."""
    use = {op: choice.reference for op, choice in OPS.items()}

    def row_by_row(variant: Variant, *fields: Tensor) -> tuple:  # to bound the memory
        rows = [
            attend(use, shape, variant, Attention(*(field[b : b + 1] for field in fields)))
            for b in range(shape.batch)
        ]
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    def expect(variant: Variant) -> Expected:
        # Two pages of all but equal score may change places when rounded.
        return Expected(partial(row_by_row, variant), x, ids_may_differ=0.02)

    whole = expect(next(v for v in table if v.select))
    return {v.name: whole if v.lens == "lens" else expect(v) for v in table}


def bench_decode_attention(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    for heads, kv_heads, dim in options.shape:
        # Several sequences for the first shape only: the others would repeat what it shows.
        first = (heads, kv_heads, dim) == options.shape[0]
        batches = options.batch if first else options.batch[:1]
        for batch in batches:
            for tokens in options.tokens:
                for dtype in options.dtype:
                    shape = Shape(batch, heads, kv_heads, dim, tokens, DTYPES[dtype])
                    yield _bench_attention(shape, dtype, options.budget, run)


def _bench_attention(shape: Shape, dtype: str, budget: int, run: Settings) -> list[Row]:
    sets = attention_sets(shape, min(budget, shape.tokens), run)
    contenders = list(attention_contenders(shape, budget, sets[0], run.device))
    return measure("decode_attention", str(shape), dtype, sets, contenders, run)


# --- merge_states ---------------------------------------------------------------------------------


def bench_merge_states(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: the partial results have just been computed."""
    for dtype in options.dtype:
        for batch in (1, 64):
            heads, _, dim = options.shape[0]
            sets = [_states(batch, heads, dim, DTYPES[dtype], run.device) for _ in range(8)]
            moved = 3 * batch * heads * (dim * DTYPES[dtype].itemsize + 4)
            baselines = {"torch-logaddexp": _torch_merge}
            contenders = plain_contenders("merge_states", sets[0], moved, baselines, run)
            shape = f"B={batch} {heads}x{dim}"
            yield measure("merge_states", shape, dtype, sets, contenders, run)


def _states(batch: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple:
    outs = [torch.randn(batch, heads, dim, device=device).to(dtype) for _ in "ab"]
    lses = [torch.randn(batch, heads, device=device) * 4 for _ in "ab"]
    return outs[0], lses[0], outs[1], lses[1]


def _torch_merge(x: tuple) -> tuple[Tensor, Tensor]:
    out, lse = OPS["merge_states"].reference(*x)
    return out.to(x[0].dtype), lse
