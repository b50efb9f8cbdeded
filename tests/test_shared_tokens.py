"""Methods whose layers share the tokens that one layer has selected, against a slow reading."""

import pytest
import torch

from kvcomp import LessIsMore, RandomPages, TidalDecode
from slow.eviction import KV_HEADS, SCALE, new_cache
from slow.retrieval_traces import Walk

pytestmark = pytest.mark.usefixtures("one_thread")


# The methods that share tokens between layers.

LAYERS = 5


def slow_shared(trace, method, choose):
    """The outputs of all steps, [steps, layers, B, Hq, D], one layer of one row at a time."""
    outputs = []
    for step in range(trace.steps):
        rows = []
        for row, length in enumerate(trace.lens):
            length, chosen, layers = length + step + 1, None, []
            everything = max(trace.lens) + step + 1 <= method.budget
            for layer in range(trace.layers):
                q = trace.q[layer, row, :, length - 1].double().unflatten(0, (KV_HEADS, -1))
                k, v = (x[layer, row, :, :length].double() for x in (trace.k, trace.v))
                logits = q @ k.transpose(1, 2) * SCALE  # [Hkv, G, n]
                probs = logits.softmax(-1)
                if layer in (1, 3):
                    chosen = choose(method, logits)
                elif layer > 1 and not everything:
                    probs = logits.masked_fill(~chosen[:, None], -torch.inf).softmax(-1)
                layers.append((probs @ v).flatten(0, 1))
            rows.append(torch.stack(layers))
        outputs.append(torch.stack(rows, 1))
    return torch.stack(outputs).float()


def most_probable(method, logits):
    score = logits.softmax(-1).sum(1)
    score[:, -method.recent :] = torch.inf
    keep = score.topk(min(method.budget, score.shape[-1]), -1).indices
    return torch.zeros_like(score).scatter(-1, keep, 1.0).bool()


def best_of_any_head(method, logits):
    length = logits.shape[-1]
    ranking = logits.flatten(0, 1).argsort(-1, descending=True).tolist()
    chosen = list(range(length))[-method.recent :]
    for place in range(length):
        for token in sorted({tokens[place] for tokens in ranking}):
            if token not in chosen and len(chosen) < method.budget:
                chosen.append(token)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[chosen] = True
    return mask.expand(KV_HEADS, -1)


@pytest.mark.parametrize(
    "method, choose",
    [(TidalDecode, most_probable), (LessIsMore, best_of_any_head)],
    ids=["tidal-decode", "less-is-more"],
)
@pytest.mark.parametrize("recent", [1, 5])
def test_shared_tokens(method, choose, recent):
    method = method(budget=16, recent=recent, dense_layers=1, selecting=(1, 3))
    trace = Walk(40, 11, steps=14, layers=LAYERS)
    got = trace.run(new_cache(method, LAYERS))
    torch.testing.assert_close(got, slow_shared(trace, method, choose), rtol=1e-4, atol=2e-5)


def test_shared_tokens_read_what_they_say():
    cache = new_cache(TidalDecode(budget=16, dense_layers=0), LAYERS)
    assert cache.method.plan(LAYERS) == (0, 2) and TidalDecode().plan(28) == (2, 14)
    trace = Walk(40, steps=10, layers=LAYERS)
    trace.run(cache)
    dense = sum(range(41, 51))
    assert [int(n) for n in cache.meter.read_tokens] == [dense, 160, dense, 160, 160]


@pytest.mark.parametrize("method", [TidalDecode, LessIsMore, RandomPages])
@pytest.mark.parametrize("layers, dense", [(2, 1), (3, 1), (4, 2), (30, None)])
def test_shallow_models_are_not_all_dense(method, layers, dense):
    """Gemma 3 270M has three layers that attend to everything."""
    trace = Walk(40, steps=2, layers=layers)
    small = {"page_size": 4} if method is RandomPages else {}
    cache = new_cache(method(budget=16, recent=1, **small), layers)
    trace.run(cache)
    whole = [int(n) == 41 + 42 for n in cache.meter.read_tokens]
    if dense is None:  # as published
        dense = 3 if method is RandomPages else 4
        assert whole[:3] == [True] * 3
    assert sum(whole) == dense and whole[0] and not whole[-1]
