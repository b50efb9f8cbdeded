"""Attention of one layer: vLLM's CPU kernel beside kvcomp's over the same tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from harness.record import Row
from harness.timing import interleave
from kvcomp import Delta
from kvcomp.engines.vllm import pages
from kvcomp.engines.vllm.step import PlacedModel, Step

BLOCK = 128  # vLLM's own on a CPU


def bench_attention(options: argparse.Namespace) -> Iterator[Row]:
    """Layers of every shape and context; then a whole step of Delta by their sum."""
    for heads, kv_heads, size, layers in options.shapes:
        for batch in options.batch:
            for tokens in options.tokens:
                yield from _shape(options, heads, kv_heads, size, layers, batch, tokens)


def _shape(options, heads, kv_heads, size, layers, batch, tokens) -> Iterator[Row]:
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, page, scale = torch.bfloat16, 16, size**-0.5
    delta = Delta(budget=options.budget, page_size=page)
    blocks = batch * -(-tokens // BLOCK)
    torch.manual_seed(0)
    q = torch.randn(batch, heads, size, dtype=dtype)
    key, value = torch.randn(2, blocks * BLOCK, kv_heads, size, dtype=dtype)
    slots = torch.arange(blocks * BLOCK)

    theirs = torch.zeros(blocks, kv_heads, 2 * BLOCK, size, dtype=dtype)
    keys, values = theirs.chunk(2, dim=2)
    isa = _get_attn_isa(dtype, BLOCK, size)
    vllm_ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)
    table = torch.randperm(blocks).view(batch, -1).int()
    lens = torch.full((batch,), tokens, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    schedule = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=lens,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    stock = torch.empty_like(q)

    def vllm_kernel():
        vllm_ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=stock,
            query_start_loc=starts,
            seq_lens=lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )

    ours = torch.zeros(blocks * BLOCK // page, kv_heads, page, 2 * size, dtype=dtype)
    pages.write(ours, key, value, slots)
    k, v = pages.keys_and_values(ours)
    expanded = (table[:, :, None] * (BLOCK // page) + torch.arange(BLOCK // page)).flatten(1).int()
    logits = torch.empty(batch, heads, expanded.shape[1] * page)
    parts = PlacedModel(delta, layers).layers
    densely, planners = delta.roles(layers)
    dense, selects = parts[0], parts[min(planners)]
    sparse = parts[min(set(range(layers)) - densely)]

    def step() -> Step:
        return Step(expanded, lens, longest=tokens, page_size=page, logits=logits)

    out = torch.empty_like(q)
    selects.decode(q, k, v, step(), scale, out)
    vllm_kernel()
    torch.testing.assert_close(out, stock, atol=1e-2, rtol=2e-2)
    kept = step()
    runs = {
        "vllm": vllm_kernel,
        "kvcomp dense": lambda: dense.decode(q, k, v, kept, scale, out),
        "kvcomp delta, selecting": lambda: selects.decode(q, k, v, kept, scale, out),
        "kvcomp delta, sparse": lambda: sparse.decode(q, k, v, kept, scale, out),
    }
    times = interleave(runs, options.repeats, budget=options.seconds)

    counts = {
        "kvcomp delta, selecting": len(planners),
        "kvcomp delta, sparse": layers - len(densely),
    }
    counts["kvcomp dense"] = layers - sum(counts.values())
    shape = f"{heads}/{kv_heads} x {size}, {batch} x {tokens} tokens"
    base = times["vllm"]

    def row(name: str, median: float, minimum: float, scale_by: int = 1) -> Row:
        return Row(
            "engine attention",
            shape,
            "bf16",
            "cpu",
            name,
            ms=median * 1e3,
            ms_min=minimum * 1e3,
            ratios={"vllm": scale_by * base.median / median},
            ratios_min={"vllm": scale_by * base.minimum / minimum},
        )

    for name, time in times.items():
        yield row(name, time.median, time.minimum)
    sums = [
        sum(count * getattr(times[name], which) for name, count in counts.items())
        for which in ("median", "minimum")
    ]
    yield row(f"a step of {layers} layers, delta {options.budget}", *sums, scale_by=layers)
