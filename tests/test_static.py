"""The static flavour: one graph for all decode steps, and the tokens of the dynamic one."""

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import kvcomp
from kvcomp import METHODS, Delta, Full, Method, reasoner
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")

STEPS = 40
ROOM = 80
# Dense in layers 0 and 1, of which 1 selects; 2 and 3 attend to 16 tokens: fewer than a prompt.
DELTA = Delta(budget=16, page_size=4, recent=2, warmup=1, delta_layers=(1,))
BOTH = pytest.mark.parametrize("method", [Full(), DELTA], ids=["full", "delta"])
UNCOUNTED = {"decode_seconds", "tokens_per_second", "kv_bytes_allocated"}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def qwen3():
    return tiny_model("qwen3")


def padded_batch(rows=2, width=21, pad=6):
    """Token ids [rows, width] and their mask; where there are several, the first is padded."""
    ids = torch.randint(3, 128, (rows, width), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :pad] = mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch, **options):
    return model.generate(**batch, **{"max_new_tokens": STEPS, "do_sample": False, **options})


def compile_config(backend="eager", **options):
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, **options)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    return config


@torch.no_grad()
def decode(model, batch, cache, step, steps=STEPS):
    """Greedy decoding in a loop of one's own: the logits of all steps, [steps, B, vocabulary]."""
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = [model(**batch, position_ids=positions, past_key_values=cache).logits[:, -1]]
    for count in range(steps - 1):
        token, given = logits[-1].argmax(-1, keepdim=True), {"past_key_values": cache}
        if len(token) > 1:  # a single row has the positions that the cache says
            given["position_ids"] = positions[:, -1:] + 1 + count
        logits.append(step(token, **given).logits[:, -1].clone())  # a graph's memory is used again
    return torch.stack(logits)


def reference(model, method, batch, steps=STEPS):
    """The same under the dynamic flavour, with its report."""
    with kvcomp.patch(model, method) as run:
        logits = decode(model, batch, run.new_cache(), model, steps)
    return logits, run.report(layers=True)


def same_figures(report, expected):
    got, expected = report.to_dict(), expected.to_dict()
    for name in expected.keys() - UNCOUNTED:
        assert got[name] == expected[name], name


def addresses(cache):
    layers = cache.kv.layers
    kept = [x for layer in layers for x in (layer._k, layer._v, layer.seq_lens)]
    return [x.data_ptr() for x in (*kept, cache.kv.columns, cache.meter.counts)]


@BOTH
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_one_graph_for_all_steps(kind, method):
    """40 steps over page borders, padded rows among them; another batch size is another graph."""
    model, graphs = tiny_model(kind), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = [reference(model, method, padded_batch(rows))[0] for rows in (2, 1)]
    with kvcomp.patch(model, method, max_tokens=ROOM) as run:
        step = run.compile(fullgraph=True, backend=backend)
        for count, rows in enumerate((2, 1)):
            cache = run.new_cache()
            got = decode(model, padded_batch(rows), cache, step)
            assert len(graphs) == count + 1 and not counters["graph_break"]
            assert torch.equal(got.argmax(-1), expected[count].argmax(-1))
            torch.testing.assert_close(got, expected[count], rtol=1e-4, atol=1e-4)
            leaves = [node.args[0] for node in graphs[-1].graph.nodes if node.op == "output"]
            assert [len(outputs) for outputs in leaves] == [1], "more than the logits"
            assert cache.get_seq_length() == cache.kv.seen == 21 + STEPS - 1


@BOTH
def test_addresses_stay_and_figures_are_those_of_the_dynamic_flavour(qwen3, method):
    batch = padded_batch()
    _, expected = reference(qwen3, method, batch)
    with kvcomp.patch(qwen3, method, max_tokens=ROOM) as run:
        cache, seen = run.new_cache(), []

        def step(*args, **kwargs):
            out = qwen3(*args, **kwargs)
            seen.append(addresses(cache))
            return out

        decode(qwen3, batch, cache, step)
        same_figures(run.report(layers=True), expected)
        same_figures(run.report(layers=True), expected)  # asking changes nothing
        cache.reset()
        assert cache.get_seq_length() == 0
        decode(qwen3, batch, cache, step)
    assert len(seen) == 2 * (STEPS - 1) and all(each == seen[0] for each in seen)
    report = run.report()
    assert report.tokens_decoded == 2 * expected.tokens_decoded
    assert report.kept_peak == expected.kept_peak
    assert report.kv_bytes_allocated == 2 * ROOM * sum(run.meter.slot_bytes)


class OnMeta(TorchDispatchMode):
    """Every tensor of every op is on the meta device: none comes from the host or goes there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, function
        return out


@BOTH
def test_a_step_waits_for_nothing_and_brings_nothing_from_the_host(method):
    """On a device without data: reading a tensor, or a shape that depends on one, is an error."""
    model, token = tiny_model("qwen3"), torch.zeros(2, 1, dtype=torch.long, device="meta")
    with kvcomp.patch(model, method, max_tokens=ROOM) as run, torch.no_grad():
        cache = run.new_cache()
        model(padded_batch()["input_ids"], past_key_values=cache)
        model.to("meta")
        for layer in cache.kv.layers:
            layer._bind(tuple(tensor.to("meta") for tensor in layer._slab))
        cache.kv.open(torch.device("meta"))
        with OnMeta():
            assert model(token, past_key_values=cache).logits.is_meta
        with pytest.raises(RuntimeError, match="meta"):
            cache.kv.reset()  # which reads the counts


@BOTH
def test_compiled_generate(qwen3, method):
    """transformers' own compiled path, twice: one cache, one graph; and nothing of it stays."""
    batch = padded_batch()
    before = dict(qwen3.__dict__)
    with kvcomp.patch(qwen3, method) as run:
        expected = generate(qwen3, batch)
    figures = run.report(layers=True)
    with kvcomp.patch(qwen3, method, max_tokens=ROOM) as run:
        for count in (1, 2):
            out = generate(qwen3, batch, compile_config=compile_config())
            assert torch.equal(out, expected)
            assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
            report = run.report()
            assert report.tokens_decoded == count * figures.tokens_decoded
            assert report.attended_ratio == pytest.approx(figures.attended_ratio)
            assert report.decode_seconds > 0
        kept = run.new_cache()  # another one does not disturb it
        with torch.no_grad():
            qwen3(batch["input_ids"], past_key_values=kept)
        assert torch.equal(generate(qwen3, batch), expected), "not compiled"
    assert qwen3.__dict__.keys() == before.keys()
    assert qwen3.config._attn_implementation == run.inner_name


def test_a_model_that_was_compiled_before_is_so_again(qwen3):
    batch = padded_batch()
    options = {"cache_implementation": "static", "compile_config": compile_config()}
    try:
        stock = generate(qwen3, batch, **options)
        compiled = qwen3._compiled_call
        with kvcomp.patch(qwen3, Full(), max_tokens=ROOM):
            generate(qwen3, batch, compile_config=compile_config())
            assert qwen3._compiled_call is not compiled
        assert qwen3._compiled_call is compiled
        assert torch.equal(generate(qwen3, batch, **options), stock)
    finally:
        for name in ("_compiled_call", "_last_compile_config", "_cache"):
            qwen3.__dict__.pop(name, None)


@BOTH
def test_the_reasoner(method):
    """Every budget below its context: what it writes is right, compiled as well."""
    model = AutoModelForCausalLM.from_pretrained(reasoner.path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(reasoner.path())
    prompt = reasoner.task.make_problem(nodes=16).prompt
    batch = tokenizer(prompt, return_tensors="pt")
    method = Delta(budget=64, page_size=4, recent=2) if method is DELTA else method
    with kvcomp.patch(model, method) as run:
        expected = generate(model, batch, max_new_tokens=64)
    figures = run.report(layers=True)
    room = batch["input_ids"].shape[1] + 64
    with kvcomp.patch(model, method, max_tokens=room) as run:
        out = generate(model, batch, max_new_tokens=64, compile_config=compile_config())
    assert torch.equal(out, expected)
    same_figures(run.report(layers=True), figures)


def test_compiled_by_inductor():
    model, batch = tiny_model("llama", num_hidden_layers=2), padded_batch()
    method = dataclasses.replace(DELTA, warmup=0, delta_layers=(0,))
    expected, _ = reference(model, method, batch, steps=12)
    with kvcomp.patch(model, method, max_tokens=ROOM) as run:
        got = decode(model, batch, run.new_cache(), run.compile(), steps=12)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_a_step_as_one_cuda_graph(method):
    """Captured once and replayed: the tokens of the dynamic flavour, and every read counted."""
    model = tiny_model("qwen3").cuda()
    batch = {name: tensor.cuda() for name, tensor in padded_batch().items()}
    expected, figures = reference(model, method, batch)
    with kvcomp.patch(model, method, max_tokens=ROOM) as run:
        graph, side, given, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), {}, {}

        def step(token, *, position_ids, past_key_values):
            if not given:
                given.update(token=token.clone(), positions=position_ids.clone(), warm_up=3)
            given["token"].copy_(token)
            given["positions"].copy_(position_ids)
            inputs = {"position_ids": given["positions"], "past_key_values": past_key_values}
            if given["warm_up"]:  # on a stream of its own, as capture wants it
                given["warm_up"] -= 1
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    out = model(given["token"], **inputs)
                torch.cuda.current_stream().wait_stream(side)
                return out
            if not result:
                with torch.cuda.graph(graph):
                    result["out"] = model(given["token"], **inputs)
            graph.replay()
            return result["out"]

        got = decode(model, batch, run.new_cache(), step)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    same_figures(run.report(layers=True), figures)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_reduce_overhead_on_a_gpu(method):
    model = tiny_model("qwen3").cuda()
    batch = {name: tensor.cuda() for name, tensor in padded_batch().items()}
    expected, _ = reference(model, method, batch)
    with kvcomp.patch(model, method, max_tokens=ROOM) as run:
        got = decode(model, batch, run.new_cache(), run.compile())
        assert torch.equal(generate(model, batch), generate(model, batch))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_rows_and_turns(qwen3):
    """Beams reorder rows, a second turn and pieces of a prompt attend to what is there, a copy
    goes on by itself, a prompt may be one token."""
    batch = padded_batch()
    one = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}

    def everything(run):
        yield generate(qwen3, batch, num_beams=3, max_new_tokens=12)
        yield generate(qwen3, batch, prefill_chunk_size=5, max_new_tokens=12)
        yield generate(qwen3, one, max_new_tokens=12)
        first = generate(qwen3, batch, return_dict_in_generate=True, max_new_tokens=12)
        yield generate(qwen3, padded_batch(3), max_new_tokens=12)  # does not touch what is returned
        ids = torch.cat([first.sequences, batch["input_ids"][:, -9:]], 1)
        mask = torch.ones_like(ids)
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
        second = {"input_ids": ids, "attention_mask": mask}
        copied = copy.deepcopy(first.past_key_values)
        for cache in (copied, first.past_key_values):
            yield generate(qwen3, second, past_key_values=cache, max_new_tokens=12)
        cache = run.new_cache()
        with torch.no_grad():
            qwen3(**batch, past_key_values=cache)
            mask = batch["attention_mask"]
            for new in ([[0], [1]], [[1], [1]]):  # the first row takes part in the second step only
                mask = torch.cat([mask, torch.tensor(new)], 1)
                given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
                out = qwen3(torch.full((2, 1), 9), past_key_values=cache, **given)
                yield out.logits[:, -1][mask[:, -1] > 0]
            cache.batch_repeat_interleave(2)
            yield qwen3(torch.full((4, 1), 9), past_key_values=cache).logits

    with kvcomp.patch(qwen3, DELTA) as run:
        expected = list(everything(run))
    with kvcomp.patch(qwen3, DELTA, max_tokens=ROOM) as run:
        for got, want in zip(everything(run), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_host_counts_once_where_nothing_is_compiled(qwen3):
    """Where dynamo is off, or gives up, the step runs eagerly with all of its hooks."""
    batch = padded_batch()
    expected, figures = reference(qwen3, DELTA, batch)
    with kvcomp.patch(qwen3, DELTA, max_tokens=21 + STEPS - 1) as run:
        got = decode(qwen3, batch, run.new_cache(), run.compile(disable=True))
        assert torch.equal(got, expected)
    same_figures(run.report(layers=True), figures)


def test_a_method_of_ones_own(qwen3):
    @dataclasses.dataclass(frozen=True)
    class Window(Method):
        """The newest tokens, by page ids of one token each."""

        static = True

        def attend(self, layer, q, scale):
            first = (layer.seq_lens - 16).clamp(min=0)
            tokens = first[:, None] + torch.arange(16, dtype=torch.int32)
            lens = layer.seq_lens.clamp(max=16)
            return layer.attend(q, scale, page_ids=tokens[:, None], seq_lens=lens)[0]

    batch = padded_batch()
    expected, figures = reference(qwen3, Window(), batch)
    with kvcomp.patch(qwen3, Window(), max_tokens=ROOM) as run:
        step = run.compile(fullgraph=True, backend="eager")
        got = decode(qwen3, batch, run.new_cache(), step)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    same_figures(run.report(layers=True), figures)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.static])
def test_methods_that_decide_on_the_host_are_refused(qwen3, name):
    before = dict(qwen3.__dict__)
    with pytest.raises(ValueError, match=r"max_tokens: .* leave max_tokens out"):
        kvcomp.patch(qwen3, METHODS[name].example(), max_tokens=ROOM)
    assert qwen3.__dict__ == before


def test_a_hybrid_model_is_refused():
    with pytest.raises(ValueError, match="sliding or linear layers"):
        kvcomp.patch(tiny_model("gemma3_text"), Full(), max_tokens=ROOM)


@pytest.mark.parametrize("given, kind", [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_max_tokens_is_a_whole_number(qwen3, given, kind):
    with pytest.raises(kind, match=r"kvcomp.patch: max_tokens: expected"):
        kvcomp.patch(qwen3, Full(), max_tokens=given)


def test_more_than_there_is_room_for(qwen3):
    """Refused before anything is lost: the cache goes on from where it is."""
    batch = padded_batch()
    with kvcomp.patch(qwen3, Full()):
        expected = generate(qwen3, batch, max_new_tokens=10)
    with kvcomp.patch(qwen3, Full(), max_tokens=30) as run, torch.no_grad():
        with pytest.raises(ValueError, match=r"need room for 31 tokens .*max_tokens=30"):
            generate(qwen3, batch, max_new_tokens=11)
        assert torch.equal(generate(qwen3, batch, max_new_tokens=10), expected)
        cache = run.new_cache()
        qwen3(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match=r"21 tokens are in the cache and 21 more"):
            qwen3(batch["input_ids"], past_key_values=cache)
        position = batch["attention_mask"].sum(1, keepdim=True)
        for step, token in enumerate(expected[:, 21:].T):
            if step == 9:
                with pytest.raises(ValueError, match=r"30 tokens are in the cache and 1 more"):
                    qwen3(token[:, None], past_key_values=cache)
                break
            out = qwen3(token[:, None], position_ids=position + step, past_key_values=cache)
        assert torch.equal(out.logits[:, -1].argmax(-1), expected[:, -1])
        with pytest.raises(ValueError, match="takes no tokens back"):
            cache.crop(-1)
        one = {name: tensor[1:, :5] for name, tensor in batch.items()}
        with pytest.raises(ValueError, match="assisted decoding"):
            generate(qwen3, one, max_new_tokens=5, prompt_lookup_num_tokens=3, eos_token_id=2)
        hidden = torch.ones(2, 25, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask"):
            qwen3(batch["input_ids"][:, :4], attention_mask=hidden, past_key_values=run.new_cache())
