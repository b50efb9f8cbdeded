"""Caches of one size whose tokens leave: one graph for all steps, evictions between them."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from kvcomp import LagKV, LazyEviction, RaaS, RecencyWindow, ops, reasoner
from kvcomp.testing.models import tiny_model
from slow.static_decoding import (
    OnMeta,
    addresses,
    captured_step,
    compile_config,
    decode,
    padded_batch,
    reference,
    same_figures,
    to_meta,
    turns,
)

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")

STEPS = 60
ROOM = 10_000  # what it would hold if nothing left
WIDTH = 21  # of a prompt; the padded row has 15 tokens
LAZY = LazyEviction(budget=24, window=7, alpha=0.05)
OWN = {"linear_rows": False}  # in a graph norms are the model's own, whose last bits differ
METHODS = {
    "lazy": LAZY,
    "lazy-window-of-several-replays": LazyEviction(budget=50, window=36, alpha=0.05),
    "lazy-long-prompt": LazyEviction(budget=16, window=5, alpha=0.05, unit="layer", h1="code"),
    "lazy-query-head": LazyEviction(budget=24, window=7, alpha=0.05, unit="query_head"),
    "lazy-keeps-the-prompt": LazyEviction(budget=24, window=9, alpha=0.05, keep_prompt=True),
    "raas": RaaS(budget=30, window=3, alpha=0.05),
    "recency": RecencyWindow(budget=22, window=4),
    "lagkv": LagKV(budget=30, window=5, partition=6, sinks=2),
}
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(scope="module")
def qwen3():
    return tiny_model("qwen3")


def planned(method, width=WIDTH):
    """Slots of a layer: until the first eviction of a prompt of `width`."""
    kept = max(method.budget, width + method.num_recent) if method.keep_prompt else method.budget
    return max(kept, width) + method.window


@ALL
def test_one_graph_with_the_tokens_of_the_dynamic_flavour(qwen3, method):
    """Over many windows, padded rows among them, bit by bit; and the figures, layer by layer."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected, figures = reference(qwen3, method, padded_batch(), STEPS, **OWN)
    assert figures.evictions >= 4 and figures.tokens_evicted > 0
    with kvcomp.patch(qwen3, method, max_tokens=ROOM, **OWN) as run:
        step, cache = run.compile(fullgraph=True, backend=backend), run.new_cache()
        assert torch.equal(decode(qwen3, padded_batch(), cache, step, STEPS), expected)
        assert len(graphs) == 1 and not counters["graph_break"]
        outputs = [node.args[0] for node in graphs[0].graph.nodes if node.op == "output"]
        assert [len(each) for each in outputs] == [1], "more than the logits"
        assert cache.get_seq_length() == WIDTH + STEPS - 1
        same_figures(run.report(layers=True), figures)
        same_figures(run.report(layers=True), figures)  # asking changes nothing


@ALL
def test_memory_is_planned_and_stays_where_it_is(qwen3, method):
    expected, figures = reference(qwen3, method, padded_batch(), STEPS)
    with kvcomp.patch(qwen3, method, max_tokens=ROOM) as run:
        cache, seen = run.new_cache(), set()

        def step(*args, **kwargs):
            out = qwen3(*args, **kwargs)
            seen.add(tuple(addresses(cache)))
            return out

        for _ in range(2):  # the memory of the first batch serves the second
            assert torch.equal(decode(qwen3, padded_batch(), cache, step, STEPS), expected)
            cache.reset()
        report = run.report()
    assert len(seen) == 1
    assert report.tokens_decoded == 2 * figures.tokens_decoded
    assert report.evictions == 2 * figures.evictions
    slots = planned(method)
    held = sum(x.nbytes for layer in cache.kv.layers for x in layer._slab[:2])
    assert held == report.kv_bytes_allocated == 2 * slots * sum(run.meter.slot_bytes)
    assert slots < ROOM / 100 and report.kept_peak <= slots
    bits = [note.numel() * 32 for layer in cache.kv.layers for note in layer._remembered.values()]
    units = {"layer": 1, "kv_head": 2, "query_head": 4}[method.unit]
    assert set(bits) <= {2 * 32 * units * (-(-slots // 32) * 32)}


@pytest.mark.parametrize("method", [LAZY, METHODS["lagkv"]], ids=["lazy", "lagkv"])
def test_a_step_waits_for_nothing_and_brings_nothing_from_the_host(method):
    """On a device without data, where reading a tensor is an error; then tokens would leave."""
    model, token = tiny_model("qwen3"), torch.zeros(2, 1, dtype=torch.long, device="meta")
    with kvcomp.patch(model, method, max_tokens=ROOM) as run, torch.no_grad():
        cache = run.new_cache()
        model(padded_batch()["input_ids"], past_key_values=cache)
        to_meta(model, cache)
        with OnMeta():
            for _ in range(method.window - 1):
                assert model(token, past_key_values=cache).logits.is_meta
        with pytest.raises(RuntimeError, match="meta"):
            cache.kv.reset()  # which reads the counts


def test_turns(qwen3):
    """Beams, pieces of a prompt, second turns over what is left, copies, repeated rows."""
    method = dataclasses.replace(LAZY, budget=14, window=3)  # below every prompt
    batch = padded_batch()
    with kvcomp.patch(qwen3, method) as run:
        expected = list(turns(qwen3, run, batch))
    assert run.report().tokens_evicted > 0
    with kvcomp.patch(qwen3, method, max_tokens=80) as run:
        for got, want in zip(turns(qwen3, run, batch), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_longer_prompts_move_to_larger_memory(qwen3):
    """Shorter ones use what is there; each size of memory has its graph, or one has all."""
    widths = (10, 21, 40, 60, 30)
    batches = [padded_batch(width=width) for width in widths]
    expected = [reference(qwen3, LAZY, batch, 30, **OWN)[0] for batch in batches]
    with kvcomp.patch(qwen3, LAZY, max_tokens=ROOM, **OWN) as run:
        step, cache, longest = run.compile(fullgraph=True, backend="eager"), run.new_cache(), 0
        for width, batch, want in zip(widths, batches, expected, strict=True):
            assert torch.equal(decode(qwen3, batch, cache, step, 30), want)
            longest = max(longest, planned(LAZY, width))
            assert {layer.capacity for layer in cache.kv.layers} == {longest}
            cache.reset()
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


def test_less_room_than_the_budget(qwen3):
    """Nothing ever leaves, and the cache has max_tokens slots."""
    method = LazyEviction(budget=70, window=10)
    expected, figures = reference(qwen3, method, padded_batch(), 20)
    with kvcomp.patch(qwen3, method, max_tokens=40) as run:
        cache = run.new_cache()
        assert torch.equal(decode(qwen3, padded_batch(), cache, qwen3, 20), expected)
        same = run.report().to_dict()
        with pytest.raises(ValueError, match="holds 40 tokens and 1 more do not fit"):
            qwen3(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    assert {layer.capacity for layer in cache.kv.layers} == {40}
    assert same["kept_peak"] == figures.kept_peak and same["evictions"] == 0


def test_compiled_generate(qwen3):
    """transformers' own compiled path, twice: one cache, one graph."""
    batch = padded_batch()
    options = {"max_new_tokens": STEPS, "do_sample": False}
    with kvcomp.patch(qwen3, LAZY) as run:
        expected = qwen3.generate(**batch, **options)
    figures = run.report()
    with kvcomp.patch(qwen3, LAZY, max_tokens=ROOM) as run:
        for count in (1, 2):
            out = qwen3.generate(**batch, **options, compile_config=compile_config())
            assert torch.equal(out, expected)
            assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
            assert run.report().tokens_evicted == count * figures.tokens_evicted
        assert torch.equal(qwen3.generate(**batch, **options), expected), "not compiled"
        one = {name: tensor[1:] for name, tensor in batch.items()}
        with pytest.raises(ValueError, match="assisted decoding"):
            qwen3.generate(**one, **options, prompt_lookup_num_tokens=3, eos_token_id=2)


def test_the_reasoner():
    """What it writes is right, and the same: the budget is below what there is to remember."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    prompt = reasoner.task.make_problem(nodes=16).prompt
    batch = tokenizer(prompt, return_tensors="pt")
    method = LazyEviction(budget=96, window=24, alpha=0.2)
    with kvcomp.patch(model, method) as run:
        expected = model.generate(**batch, max_new_tokens=64, do_sample=False)
    figures = run.report(layers=True)
    assert figures.tokens_evicted > 0
    with kvcomp.patch(model, method, max_tokens=ROOM) as run:
        options = {"max_new_tokens": 64, "do_sample": False, "compile_config": compile_config()}
        assert torch.equal(model.generate(**batch, **options), expected)
    same_figures(run.report(layers=True), figures)


def test_compiled_by_inductor():
    model, batch = tiny_model("llama", num_hidden_layers=1), padded_batch()
    expected, _ = reference(model, LAZY, batch, 24)
    with kvcomp.patch(model, LAZY, max_tokens=ROOM) as run:
        got = decode(model, batch, run.new_cache(), run.compile(), 24)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_model_compiled_alone_is_refused(qwen3):
    """Nobody would evict between its steps."""
    with kvcomp.patch(qwen3, LAZY, max_tokens=ROOM) as run:
        alone = torch.compile(qwen3, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use run\.compile\(\)"):
            decode(qwen3, padded_batch(), run.new_cache(), alone)


@pytest.mark.parametrize("units", [1, 2, 8])
def test_hits_of_a_row_that_a_tensor_names(units):
    """A number and a tensor write the same, and that row alone."""
    logits, lens = torch.randn(3, 8, 70), torch.tensor([70, 1, 33], dtype=torch.int32)
    lse = logits.logsumexp(-1)
    alone = torch.empty(3, units, 3, dtype=torch.int32)
    ops.attention_hits(logits, lse, lens, alone, 0.02)
    for row in (4, torch.tensor([4])):
        hits = torch.full((3, 6, units, 3), -7, dtype=torch.int32)
        ops.attention_hits(logits, lse, lens, hits, 0.02, row=row)
        assert torch.equal(hits[:, 4], alone)
        assert (hits[:, [0, 1, 2, 3, 5]] == -7).all()
    for row in (torch.tensor(4), torch.tensor([4, 5]), torch.tensor([4.0])):
        with pytest.raises(ValueError, match=r"'row': expected a number or a tensor \[1\]"):
            ops.attention_hits(logits, lse, lens, hits, 0.02, row=row)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL
def test_a_step_as_one_cuda_graph(method):
    """Captured once and replayed, the host beside it: what the dynamic flavour gives."""
    model = tiny_model("qwen3").cuda()
    batch = {name: tensor.cuda() for name, tensor in padded_batch().items()}
    expected, figures = reference(model, method, batch, STEPS)
    with kvcomp.patch(model, method, max_tokens=ROOM) as run:
        step = captured_step(model, lambda cache: cache.step())
        got = decode(model, batch, run.new_cache(), step, STEPS)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    same_figures(run.report(layers=True), figures)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reduce_overhead_on_a_gpu():
    model = tiny_model("qwen3").cuda()
    batch = {name: tensor.cuda() for name, tensor in padded_batch().items()}
    expected, figures = reference(model, LAZY, batch, STEPS)
    with kvcomp.patch(model, LAZY, max_tokens=ROOM) as run:
        got = decode(model, batch, run.new_cache(), run.compile(), STEPS)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert run.report().tokens_evicted == figures.tokens_evicted
