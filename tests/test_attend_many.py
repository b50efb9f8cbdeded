"""Several new tokens over a filled cache: each attends to what was kept and to those before it."""

import pytest
import torch

from kvcomp import Full
from kvcomp.cache import KVCache
from kvcomp.hf.attention import attend_many

HEADS, KV_HEADS, DIM, KEPT, SCALE = 6, 2, 64, 37, 0.2
pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_outputs")
COUNTS = (1, 2, 7, 64, 65, 130)  # of which the op takes up to 64 at a time


def filled(count, dtype, valid=None, copies=1, sinks=None):
    """A layer that holds KEPT tokens, less the padding of its first row, and then `count`."""
    random = torch.Generator().manual_seed(count)
    cache = KVCache(Full(), 1)
    layer = cache.layers[0]
    q = torch.randn(2, HEADS, count, DIM, generator=random).to(dtype)
    (k, v), (new_k, new_v) = (
        [torch.randn(2, KV_HEADS, n, DIM, generator=random).to(dtype) for _ in "kv"]
        for n in (KEPT, count)
    )
    before = torch.ones(2, KEPT, dtype=torch.bool)
    before[0, :5] = False
    layer.append(k, v, before)
    if copies > 1:
        layer.repeat_heads(KV_HEADS * copies)
    layer.append(new_k, new_v, valid)
    layer.sinks = sinks
    everything = (torch.cat(parts, 2) for parts in ((k, new_k), (v, new_v)))
    return cache, layer, q, everything, before


def slowly(q, k, v, before, valid, sinks=None):
    """Row by row, head by head, query by query, in float64: [B, n, Hq, D]; NaN for padding."""
    batch, _, count, _ = q.shape
    out = torch.full((batch, count, HEADS, DIM), torch.nan, dtype=torch.float64)
    for b in range(batch):
        for i in range(count):
            if valid is not None and not valid[b, i]:
                continue
            seen = torch.zeros(KEPT + count, dtype=torch.bool)
            seen[:KEPT] = before[b]
            seen[KEPT : KEPT + i + 1] = True if valid is None else valid[b, : i + 1]
            for head in range(HEADS):
                of = head // (HEADS // KV_HEADS)
                logits = k[b, of, seen].double() @ q[b, head, i].double() * SCALE
                extra = logits.new_zeros(0) if sinks is None else sinks[head : head + 1].double()
                probs = torch.cat([logits, extra]).softmax(0)[: len(logits)]
                out[b, i, head] = probs @ v[b, of, seen].double()
    return out


def check(out, want):
    assert out.isfinite().all() and out.shape == want.shape
    of_token = want.isfinite()
    close = {"rtol": 1.6e-2, "atol": 2e-2} if out.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out[of_token], want[of_token].to(out.dtype), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS)
def test_rows_of_unlike_lengths(count, dtype):
    _cache, layer, q, (k, v), before = filled(count, dtype)
    out = attend_many(layer, q, None, SCALE)
    check(out, slowly(q, k, v, before, None))


@pytest.mark.parametrize("count", COUNTS[1:])
def test_padding_among_the_new(count):
    """Before, between and behind the tokens."""
    valid = torch.rand(2, count, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[0, 0], valid[1, -1] = False, False
    _cache, layer, q, (k, v), before = filled(count, torch.float32, valid)
    out = attend_many(layer, q, valid, SCALE)
    check(out, slowly(q, k, v, before, valid))


@pytest.mark.parametrize("count", COUNTS)
def test_sinks_and_copies_of_the_heads(count):
    sinks = torch.linspace(-2, 3, HEADS)
    _cache, layer, q, (k, v), before = filled(count, torch.float32, None, 3, sinks)
    out = attend_many(layer, q, None, SCALE)
    check(out, slowly(q, k, v, before, None, sinks))
