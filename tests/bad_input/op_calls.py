"""How the public functions are called: a good call of each op, under the op's name.

Rows of bad input replace some of its arguments, and test_ops.py compiles it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bad_input import Attempt, bits
from kvcomp import ops

B, HQ, HKV, T, D = 2, 8, 2, 40, 64


class Call(Attempt):
    """A call that is about to be made; none of its tensors may change if it fails."""

    def __init__(self, op: Callable, *args: Any, **named: Any) -> None:
        self.args, self.named = args, named
        tensors = [*args, *named.values()]
        super().__init__(run=lambda: op(*args, **named), state=lambda: bits(tensors))


def decode_attention(**changes):
    """A good call of decode_attention, with some arguments replaced."""
    args = {
        "q": torch.randn(B, HQ, D),
        "k": torch.randn(B, HKV, T, D),
        "v": torch.randn(B, HKV, T, D),
        "seq_lens": torch.full((B,), T, dtype=torch.int32),
        **changes,
    }
    return Call(ops.decode_attention, **args)


def paged(page_ids, page_size=16, **changes):
    lens = torch.full((B,), 16, dtype=torch.int32)
    return decode_attention(page_ids=page_ids, page_size=page_size, **{"seq_lens": lens, **changes})


def pooled(**changes):
    """A good call of decode_attention over a pool of pages."""
    pool = torch.randn(5, 16, HKV, 2 * D).transpose(1, 2)
    args = {
        "k": pool[..., :D],
        "v": pool[..., D:],
        "seq_lens": ints(32, 16),
        "page_ids": ints(3, 0, 4, 1).view(B, 2),
        "page_size": 16,
        "out": torch.zeros(B, HQ, D),
        "lse": torch.zeros(B, HQ),
    }
    return decode_attention(**args | changes)


def append_attention(count=3, **changes):
    """A good call of append_attention, all pages listed."""
    args = {
        "q": torch.randn(B, count, HQ, D),
        "k": torch.randn(B, HKV, T, D),
        "v": torch.randn(B, HKV, T, D),
        "seq_lens": ints(T, count),
        "q_lens": ints(count, 1),
        "tail": torch.ones(B, count, dtype=torch.int64),
        "page_ids": torch.arange(T // 8, dtype=torch.int32).expand(B, 1, -1),
        "page_size": 8,
        **changes,
    }
    return Call(ops.append_attention, **args)


def latent_attention(**changes):
    """A good call of latent_attention, all pages listed."""
    args = {
        "q": torch.randn(B, HQ, 48),
        "latents": torch.randn(B, T, 48),
        "seq_lens": ints(T, 3),
        "value_dim": 32,
        "scale": 0.2,
        "page_ids": torch.arange(T // 8, dtype=torch.int32).expand(B, 1, -1),
        "page_size": 8,
        **changes,
    }
    return Call(ops.latent_attention, **args)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def linear_rows(**changes):
    args = {"x": torch.randn(B, 1, D), "weight": torch.randn(12, D), "bias": torch.randn(12)}
    return Call(ops.linear_rows, **args | changes)


def norm_rows(**changes):
    args = {"x": torch.randn(B, 1, D), "weight": torch.randn(D), "eps": 1e-6}
    return Call(ops.norm_rows, **args | changes)


def rotate_rows(**changes):
    args = {"q": torch.randn(B, HQ, 3, D), "k": torch.randn(B, HKV, 3, D)}
    args |= {name: torch.randn(B, 3, D) for name in ("cos", "sin")}
    return Call(ops.rotate_rows, **args | changes)


def quantize_rows(turn=False, **changes):
    args = {"k": torch.randn(B, HKV, 3, D), "v": torch.randn(B, HKV, 3, D)}
    args |= {name: torch.zeros(B, HKV, 3, D, dtype=torch.int8) for name in ("k_codes", "v_codes")}
    args |= {"words": torch.zeros(B, HKV, 3, dtype=torch.int32), **changes}
    return Call(ops.quantize_rows, *args.values(), turn=turn)


def hadamard(**changes):
    return Call(ops.hadamard, **{"x": torch.randn(B, HQ, D), **changes})


def codes(**changes):
    """A good call of decode_attention over K and V in eight bits."""
    args = {name: torch.zeros(B, HKV, T, D, dtype=torch.int8) for name in ("k", "v")}
    words = torch.zeros(B, HKV, T, dtype=torch.int32)
    return decode_attention(**args | {"words": words} | changes)


def merge_states(**changes):
    args = {"out_a": torch.randn(B, HQ, D), "lse_a": torch.randn(B, HQ)}
    args |= {"out_b": torch.randn(B, HQ, D), "lse_b": torch.randn(B, HQ), **changes}
    return Call(ops.merge_states, **args)


def page_scores(page_size=16, num_groups=1, reduction="max", **changes):
    args = {"logits": torch.randn(B, HQ, T), "lse": torch.randn(B, HQ), "seq_lens": ints(T, T)}
    args |= changes
    return Call(
        ops.page_scores, *args.values(), page_size, num_groups=num_groups, reduction=reduction
    )


def select_pages(page_size=16, num_pages=2, **changes):
    counts = {name: changes.pop(name) for name in ("num_recent", "num_sink") if name in changes}
    args = {"scores": torch.rand(B, 1, 3), "seq_lens": ints(T, T), **changes}
    return Call(ops.select_pages, *args.values(), page_size, num_pages, **counts)


def listed_pages(**changes):
    """A good call of select_pages with the pages of a table."""
    args = {"table": torch.zeros(B, 5, dtype=torch.int32)}
    args |= {"pages": torch.zeros(B, 1, 2, dtype=torch.int32)}
    scores, lens = torch.rand(B, 1, 3), ints(T, T)
    return Call(ops.select_pages, scores, lens, 16, 2, **args | changes)


def store_slots(**changes):
    """A good call: two of three tokens, into parts of one cache."""
    cache = torch.zeros(4, 8, HKV, 2 * D).transpose(1, 2)
    args = {"k": torch.randn(3, HKV, D), "v": torch.randn(3, HKV, D)}
    args |= {"k_pool": cache[..., :D], "v_pool": cache[..., D:]}
    args |= {"slot_mapping": torch.tensor([9, -1, 31]), **changes}
    return Call(ops.store_slots, *args.values())


def append_rows(**changes):
    """A good call: three tokens for a row, one for the other."""
    args = {"k": torch.randn(B, HKV, 3, D), "v": torch.randn(B, HKV, 3, D)}
    args |= {name: torch.zeros(B, HKV, T, D) for name in ("k_cache", "v_cache")}
    args |= {"seq_lens": ints(T - 3, 5), "logical_lens": ints(T, 9)}
    args |= {"words": None, "words_cache": None, "added": ints(3, 1), **changes}
    return Call(ops.append_rows, *args.values())


def attend_and_select(page_size=16, num_pages=2, **changes):
    args = decode_attention().named | {"logits": torch.zeros(B, HQ, T), **changes}
    return Call(ops.attend_and_select, **args, page_size=page_size, num_pages=num_pages)


def attention_hits(threshold=0.01, **changes):
    args = {"logits": torch.randn(B, HQ, T), "lse": torch.randn(B, HQ), "seq_lens": ints(T, T)}
    args |= {"hits": torch.zeros(B, HKV, 2, dtype=torch.int32), **changes}
    return Call(ops.attention_hits, *args.values(), threshold)


def recurrence_update(first_step=7, **changes):
    args = {"hits": torch.zeros(B, 3, HKV, 2, dtype=torch.int32)}
    args |= {name: torch.zeros(B, HKV, T, dtype=torch.int32) for name in ("last_hit", "longest")}
    args |= {"seq_lens": ints(T, T), "born": ints(3, 3), **changes}
    return Call(ops.recurrence_update, *args.values(), first_step)


def select_victims(num_victims=10, num_recent=5, **changes):
    args = {"scores": torch.rand(B, HKV, T)}
    args |= {"positions": torch.arange(T, dtype=torch.int32).expand(B, HKV, T)}
    args |= {"seq_lens": ints(T, T), "kept_lens": ints(T - 10, T), **changes}
    return Call(ops.select_victims, *args.values(), num_victims, num_recent=num_recent)


def compact_kv(**changes):
    args = {"k": torch.randn(B, HKV, T, D), "v": torch.randn(B, HKV, T, D)}
    args |= {"state": [torch.zeros(B, HKV, T, dtype=torch.int32), torch.zeros(B, HKV, T)]}
    args |= {"victims": gone([1, 5, -1], [0, 39, -1]), "seq_lens": ints(T, T), **changes}
    return Call(ops.compact_kv, *args.values())


def gone(*units):
    """Victims [B, U, V]: in row 0 these, in row 1 none."""
    victims = torch.full((B, len(units), len(units[0])), -1, dtype=torch.int32)
    victims[0] = torch.tensor(units)
    return victims


def rotate_keys(**changes):
    args = {"k": torch.randn(B, HKV, T, D), "shift": torch.tensor([-3, 5])}
    args |= {"inv_freq": torch.rand(D // 2), **changes}
    return Call(ops.rotate_keys, *args.values())


U, R, K = 6, 50, 12  # units, rows of the pool, wanted rows


def kmeans(cluster_size=4, window=16, iterations=2, **changes):
    args = {"keys": torch.randn(B, HKV, T, D), "first": ints(0, 3), "last": ints(T, 3), **changes}
    numbers = {"cluster_size": cluster_size, "window": window, "iterations": iterations}
    return Call(ops.kmeans, *args.values(), **numbers)


def query_similarity(**changes):
    args = {"q": torch.randn(B, HQ, D), "previous": torch.randn(B, HQ, D), **changes}
    return Call(ops.query_similarity, *args.values())


def bounds():
    """Unit u holds tokens [5 u, 5 u + 5)."""
    return torch.arange(0, 5 * U + 1, 5, dtype=torch.int32).expand(B, HKV, U + 1).clone()


def segment_boundaries(
    shortest=2, longest=8, local=4, cut_below=0.5, retrieve_below=0.5, **changes
):
    args = {"similarity": torch.zeros(B), "lengths": ints(14, 19), "starts": bounds()}
    args |= {"num_units": ints(2, 3), "num_indexed": ints(1, 3), **changes}
    numbers = {"shortest": shortest, "longest": longest, "local": local}
    numbers |= {"cut_below": cut_below, "retrieve_below": retrieve_below}
    return Call(ops.segment_boundaries, *args.values(), **numbers)


def pool(*rows, dim=D, **options):
    return [torch.randn(B, HKV, n, 2, dim, **options) for n in rows]


def held():
    """Slot t holds row t."""
    return torch.arange(T, dtype=torch.int32).expand(B, HKV, T).clone()


def store_segments(**changes):
    args = {"k": torch.randn(B, HKV, T, D), "v": torch.randn(B, HKV, T, D)}
    args |= {"slot_rows": held(), "seq_lens": ints(T, T), "starts": bounds()}
    args |= {"num_units": ints(3, 0), "closed": ints(5, 0), "pool": pool(R - 9, 9)}
    args |= {"centroids": torch.zeros(B, HKV, U, D), **changes}
    return Call(ops.store_segments, *args.values())


def unit_scores(scale=None, **changes):
    args = {"q": torch.randn(B, HQ, D), "centroids": torch.randn(B, HKV, U, D)}
    args |= {"starts": bounds(), "num_indexed": ints(U, 0), "active": ints(1, 1), **changes}
    return Call(ops.unit_scores, *args.values(), scale=scale)


def select_units(budget=9, **changes):
    args = {"scores": torch.rand(B, HKV, U), "starts": bounds(), "num_indexed": ints(U, 0)}
    args |= {"active": ints(1, 1), **changes}
    return Call(ops.select_units, *args.values(), budget)


def want(*heads):
    """Wanted rows [B, H, K]: in row 0 these of each head."""
    rows = torch.full((B, HKV, K), -1, dtype=torch.int32)
    for head, listed in enumerate(heads):
        rows[0, head, : len(listed)] = ints(*listed)
    return rows


def fetch_rows(num_sinks=2, **changes):
    args = {"k": torch.randn(B, HKV, T, D), "v": torch.randn(B, HKV, T, D)}
    args |= {"slot_rows": held(), "seq_lens": ints(30, T), "rows": want([3, 7, 24], [2, 8, 9])}
    args |= {"first_local": ints(25, 1), "active": ints(1, 0), "pool": pool(R - 9, 9), **changes}
    return Call(ops.fetch_rows, *args.values(), num_sinks=num_sinks)
