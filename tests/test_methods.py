"""Every method: full budget is dense, a second run forgets the first; and DELTA's own rules."""

import json
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from kvcomp import METHODS, Delta, LazyEviction, ops
from kvcomp.cache import KVCache, Report
from kvcomp.hf.calibrate import best_layers
from kvcomp.methods.retrieval import Retrieval

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, KV_HEADS, DIM = 8, 6, 2, 64
INV_FREQ = 10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))


def tokens(count, batch=2, seed=0):
    """Random K, V and q of `count` steps for every layer: [layers, B, H, count, D]."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(LAYERS, batch, KV_HEADS, count, DIM, generator=generator)
    v = torch.randn(LAYERS, batch, KV_HEADS, count, DIM, generator=generator)
    q = torch.randn(LAYERS, batch, HEADS, count, DIM, generator=generator) * 2
    return q, k, v


def decode(cache, steps, prompt=20, batch=2, seed=0):
    """Prefill, then decode; the outputs of every step and layer [steps, layers, B, Hq, D]."""
    q, k, v = tokens(prompt + steps, batch, seed)
    for layer in cache.layers:
        index = layer.position
        layer.append(k[index, :, :, :prompt], v[index, :, :, :prompt])
        cache.prefill(layer, q[index, :, :, :prompt], DIM**-0.5)
    outputs = []
    for step in range(prompt, prompt + steps):
        for layer in cache.layers:
            index = layer.position
            layer.append(k[index, :, :, step : step + 1], v[index, :, :, step : step + 1])
            outputs.append(cache.attend(layer, q[index, :, :, step], DIM**-0.5))
    return torch.stack(outputs).unflatten(0, (steps, -1))


@pytest.mark.parametrize("name", METHODS)
def test_budget_covering_everything_is_dense(name):
    dense = decode(KVCache(METHODS["full"](), LAYERS), 30, prompt=100)
    cache = KVCache(METHODS[name].example(256), LAYERS, inv_freq=INV_FREQ)
    got = decode(cache, 30, prompt=100)
    if issubclass(METHODS[name], Retrieval):  # the same tokens in another order
        assert sum(int(n) for n in cache.meter.fetched_rows) > 0
        torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(got, dense)


@pytest.mark.parametrize("name", METHODS)
def test_reset_forgets(name):
    cache = KVCache(METHODS[name].example(16), LAYERS, inv_freq=INV_FREQ)
    first = decode(cache, 40)
    cache.reset()
    assert torch.equal(decode(cache, 40), first)


@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_delta_attends_to_what_the_paper_says(sinks):
    """Against a slow reading of the rule, in plain torch, one layer and row at a time."""
    method = Delta(budget=24, page_size=4, recent=2, warmup=1, delta_layers=(1, 4), sinks=sinks)
    cache = KVCache(method, LAYERS)
    prompt, steps = 33, 12
    got = decode(cache, steps, prompt)
    q, k, v = tokens(prompt + steps)
    read = 0
    for step in range(steps):
        length = prompt + step + 1
        pages = -(-length // method.page_size)
        chosen = None
        for layer in range(LAYERS):
            keys = k[layer, :, :, :length].repeat_interleave(HEADS // KV_HEADS, 1)
            values = v[layer, :, :, :length].repeat_interleave(HEADS // KV_HEADS, 1)
            logits = torch.einsum("bhd,bhtd->bht", q[layer, :, :, length - 1], keys) * DIM**-0.5
            allowed = torch.ones(2, length, dtype=torch.bool)
            if layer not in (0, 1, 4):
                allowed = chosen
            probs = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
            read += int(allowed.sum())
            out = torch.einsum("bht,bhtd->bhd", probs, values)
            torch.testing.assert_close(got[step, layer], out, rtol=1e-4, atol=1e-5)
            if layer in (1, 4):
                score = torch.zeros(2, pages * 4)
                score[:, :length] = probs.amax(1)
                score = score.view(2, pages, 4).sum(-1)
                score[:, -2:] = score[:, :sinks] = torch.inf
                keep = score.topk(6, -1).indices
                chosen = torch.zeros(2, pages).scatter(1, keep, 1.0).bool()
                chosen = chosen.repeat_interleave(4, 1)[:, :length]
    assert sum(int(n) for n in cache.meter.read_tokens) == read


def test_delta_cost_is_the_formula_of_the_paper():
    """Tokens attended per layer and step: F dense layers read n, the others min(n, k)."""
    method = Delta(budget=32, page_size=4, recent=2)
    cache = KVCache(method, LAYERS)
    prompt, steps = 50, 20
    decode(cache, steps, prompt, batch=1)
    dense_layers = len(cache.state.dense)
    expected = 0
    for n in range(prompt + 1, prompt + steps + 1):
        in_last_page = (n - 1) % 4 + 1
        expected += dense_layers * n + (LAYERS - dense_layers) * (28 + in_last_page)
    assert sum(int(n) for n in cache.meter.read_tokens) == expected


def test_delta_rows_with_few_pages_stay_dense():
    method = Delta(budget=16, page_size=4, recent=1)
    batch, slots = 2, 40
    lens = torch.tensor([9, 40], dtype=torch.int32)
    scores = torch.rand(batch, 1, slots // 4)
    page_ids, selected = ops.select_pages(scores, lens, 4, method.num_pages, num_recent=1)
    assert page_ids[0, 0].tolist() == [0, 1, 2, -1]
    assert selected.tolist() == [9, 16]


def test_a_list_is_the_tuple_that_it_stands_for():
    listed, told = (Delta(delta_layers=kind((2, 4))) for kind in (list, tuple))
    assert listed == told and hash(listed) == hash(told) and repr(listed) == repr(told)


def test_published_and_planned_layers():
    assert Delta.published("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B").delta_layers == (2, 14, 22)
    assert Delta.for_model("DeepSeek-R1-Distill-Qwen-14B", budget=2048).delta_layers == (2, 6, 42)
    assert Delta.for_model("another", delta_layers=(2,)) == Delta(delta_layers=(2,))
    assert Delta().plan(28) == (2, 14, 22)
    assert Delta(delta_layers=(5, 14)).num_warmup(28) == 5
    assert Delta.published("DeepSeek-R1-Distill-Qwen-7B").warmup == Delta().num_warmup(28) == 2


@pytest.mark.parametrize("layers", range(2, 8))
def test_delta_leaves_half_of_few_layers_sparse(layers):
    """Models with sliding windows have few layers that attend to everything: Gemma 3 270M three."""
    dense, planners = Delta().roles(layers)
    assert 2 * len(dense) <= layers + 1 and planners
    assert (dense, planners) == ({0}, {0}) or layers > 3


def test_a_report_says_why_nothing_was_left_out():
    def why(layers, prompt, **fields):
        method = Delta(budget=16, page_size=4, recent=1, **fields)
        cache = KVCache(method, layers)
        decode(cache, 4, prompt, batch=1)
        report = Report.of(method, cache.meter, 1.0, False)
        assert (f": {report.why_dense}\n" in str(report)) == (report.why_dense is not None)
        return report.why_dense

    assert why(3, 40) is None
    assert why(3, 8) == "no context was longer than the 16 tokens of the budget"
    assert why(3, 40, warmup=2) == "all layers are dense with these settings"


def test_best_layers_finds_the_best_set():
    """The dynamic programme against trying every set."""
    generator = torch.Generator().manual_seed(3)
    recall = torch.rand(9, 9, generator=generator).tolist()

    def value(chosen):
        last = [max(c for c in chosen if c <= layer) for layer in range(2, 9)]
        return sum(recall[a][b] for a, b in zip(last, range(2, 9), strict=True))

    best = max(((2, *rest) for rest in combinations(range(3, 9), 2)), key=value)
    assert best_layers(recall, 2, 3) == best


RANK = """
import json, sys, torch, torch.distributed as dist
from kvcomp import Delta
rank, path, inputs = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
logits, lse, lens = torch.load(inputs)
logits, lse = logits.chunk(2, 1)[rank].contiguous(), lse.chunk(2, 1)[rank].contiguous()
method = Delta(budget=24, page_size=4, recent=2, group=dist.group.WORLD)
print(json.dumps(method.score(logits, lse, lens).tolist()))
"""


def test_heads_split_over_two_ranks_score_alike(tmp_path):
    logits = torch.randn(2, HEADS, 57) * 3
    inputs = (logits, logits.logsumexp(-1), torch.tensor([57, 40], dtype=torch.int32))
    torch.save(inputs, tmp_path / "inputs.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), tmp_path / "meeting", tmp_path / "inputs.pt"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    scores = [json.loads(rank.communicate(timeout=300)[0]) for rank in ranks]
    whole = Delta(budget=24, page_size=4, recent=2).score(*inputs)
    torch.testing.assert_close(torch.tensor(scores[0]), whole, rtol=1e-5, atol=1e-6)
    assert scores[0] == scores[1]


def test_published_settings_are_found_by_the_model_itself():
    def model(name):
        return SimpleNamespace(config=SimpleNamespace(_name_or_path=name))

    known = model("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B/")
    assert Delta.published(known) == Delta.published("DeepSeek-R1-Distill-Qwen-7B")
    assert LazyEviction.for_model(known) == LazyEviction.for_model("DeepSeek-R1-Distill-Qwen-7B")
    assert Delta.for_model(model("another")) == Delta()
    sizes = {each.page_size for each in (Delta.published(known), Delta.for_model(known))}
    assert sizes == {16, Delta.page_size} == {16, 8}  # the layers are the model's, pages are not
