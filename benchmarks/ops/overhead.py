"""What Python, the dispatcher and the allocation of outputs cost beyond the native call."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch

from harness.contenders import Settings
from harness.record import Row
from harness.timing import interleave
from kvcomp import _C, ops
from kvcomp.ops import OPS


def bench_overhead(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    for op, call in _tiny_calls(run.device).items():
        if op not in OPS or OPS[op].bound[run.device] not in ("cpu", "cuda"):
            continue  # no native call to compare with
        with mock.patch.object(_C, op, wraps=getattr(_C, op)) as native:
            call()
        direct = partial(getattr(_C, op), *native.call_args.args)
        # Host time on every device: a launch is asynchronous.
        timings = interleave({"bound": call, "native": direct}, 5 * run.repeats)
        bound, native = timings["bound"], timings["native"]
        rows = [
            Row(op, "overhead", "fp32", run.device, f"{name} call", t.median * 1e3, t.minimum * 1e3)
            for name, t in timings.items()
        ]
        median = max(0.0, bound.median - native.median) * 1e3
        minimum = max(0.0, bound.minimum - native.minimum) * 1e3
        yield [*rows, Row(op, "overhead", "fp32", run.device, "difference", median, minimum)]


def _tiny_calls(device: str) -> dict[str, Callable]:
    """The public function of each op on as little as it takes: a head size, eight scores."""
    q, k = torch.randn(1, 1, 32, device=device), torch.randn(1, 1, 1, 32, device=device)
    scores, keys = torch.randn(1, 1, 8, device=device), torch.randn(1, 1, 8, 32, device=device)
    lse = torch.zeros(1, 1, device=device)
    one, eight, none = (torch.tensor([n], dtype=torch.int32, device=device) for n in (1, 8, 0))
    marks = torch.zeros(1, 1, 8, dtype=torch.int32, device=device)
    slots = torch.arange(8, dtype=torch.int32, device=device).view(1, 1, 8)
    starts = torch.arange(9, dtype=torch.int32, device=device).view(1, 1, 9)
    codes, words = k.to(torch.int8), marks[..., :1]
    previous, pool = torch.randn_like(q), [torch.randn(1, 1, 8, 2, 32, pin_memory=device == "cuda")]
    pages, at = k.view(1, 1, 1, 32).clone(), torch.zeros(1, dtype=torch.int64, device=device)
    return {
        "decode_attention": lambda: ops.decode_attention(q, k, k, one),
        "append_attention": lambda: ops.append_attention(q[None], k, k, one),
        "append_rows": lambda: ops.append_rows(k, k, pages, pages.clone(), none, added=none),
        "latent_attention": lambda: ops.latent_attention(q, k[0], one, value_dim=16, scale=1.0),
        "linear_rows": lambda: ops.linear_rows(q, q[0]),
        "norm_rows": lambda: ops.norm_rows(q, q[0, 0], 1e-6),
        "rotate_rows": lambda: ops.rotate_rows(k, k, q, q),
        "merge_states": lambda: ops.merge_states(q, lse, q, lse),
        "quantize_rows": lambda: ops.quantize_rows(k, k, codes, codes, words),
        "hadamard": lambda: ops.hadamard(q),
        "page_scores": lambda: ops.page_scores(scores, lse, eight, 4),
        "select_pages": lambda: ops.select_pages(scores, eight, 1, 4),
        "attend_and_select": lambda: ops.attend_and_select(q, k, k, one, 1, 1, logits=lse[None]),
        "attention_hits": lambda: ops.attention_hits(scores, lse, eight, marks, 0.5),
        "recurrence_update": lambda: ops.recurrence_update(
            marks[:, None], marks, slots, eight, none, 1
        ),
        "select_victims": lambda: ops.select_victims(scores, slots, eight, one, 7),
        "compact_kv": lambda: ops.compact_kv(keys, keys, [marks], slots[..., 1:3], eight),
        "rotate_keys": lambda: ops.rotate_keys(k, one, lse[0]),
        "kmeans": lambda: ops.kmeans(keys, none, eight, cluster_size=4, iterations=1),
        "query_similarity": lambda: ops.query_similarity(q, previous),
        "segment_boundaries": lambda: ops.segment_boundaries(
            lse[0],
            one,
            starts,
            none,
            none,
            cut_below=-1.0,
            retrieve_below=-1.0,
            shortest=4,
            longest=8,
            local=8,
        ),
        "store_segments": lambda: ops.store_segments(
            keys, keys, slots, eight, starts, eight, none, pool, keys
        ),
        "unit_scores": lambda: ops.unit_scores(q, keys, starts, eight, one),
        "store_slots": lambda: ops.store_slots(q, q, pages, pages.clone(), at),
        "select_units": lambda: ops.select_units(scores, starts, eight, one, 4),
        "fetch_rows": lambda: ops.fetch_rows(
            keys, keys, slots, eight, slots, eight, none, pool, num_sinks=1
        ),
    }
