"""The static flavour: one graph for all decode steps, and the tokens of the dynamic one."""

import dataclasses
import os
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from kvcomp import METHODS, Delta, Full, Method, reasoner
from kvcomp.hf import linear
from kvcomp.hf.compiled import keep_code
from kvcomp.testing.models import tiny_model
from slow.static_decoding import (
    STEPS,
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

ROOM = 80
# Dense in layers 0 and 1, of which 1 selects; 2 and 3 attend to 16 tokens: fewer than a prompt.
DELTA = Delta(budget=16, page_size=4, recent=2, warmup=1, delta_layers=(1,))
BOTH = pytest.mark.parametrize("method", [Full(), DELTA], ids=["full", "delta"])


@pytest.fixture(scope="module")
def qwen3():
    return tiny_model("qwen3")


def generate(model, batch, **options):
    return model.generate(**batch, **{"max_new_tokens": STEPS, "do_sample": False, **options})


@BOTH
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "deepseek_v3"])
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
def test_a_generate_within_another_has_a_cache_of_its_own(qwen3, method):
    long, short = padded_batch(2), padded_batch(1)
    inside = []

    def asks(ids, scores):
        if ids.shape[1] == 30:
            inside.append(generate(qwen3, short))
        return scores

    with kvcomp.patch(qwen3, method, max_tokens=ROOM):
        expected = generate(qwen3, long), generate(qwen3, short)
        got = generate(qwen3, long, logits_processor=[asks]), *inside
        again = generate(qwen3, long)
    for one, other in zip((*expected, expected[0]), (*got, again), strict=True):
        assert torch.equal(one, other)


def test_a_thread_beside_another_is_refused_and_changes_nothing(qwen3):
    batch, errors = padded_batch(), []

    def beside(ids, scores):
        def decode():
            for call in (lambda: generate(qwen3, batch), lambda: qwen3(batch["input_ids"])):
                try:
                    call()
                except ValueError as error:
                    errors.append(str(error))

        if ids.shape[1] == 30:
            thread = threading.Thread(target=decode)
            thread.start()
            thread.join()
        return scores

    with kvcomp.patch(qwen3, Full(), max_tokens=ROOM):
        expected = generate(qwen3, batch)
        assert torch.equal(generate(qwen3, batch, logits_processor=[beside]), expected)
    assert len(errors) == 2
    assert all("expected one thread at a time, but another one is" in error for error in errors)


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


@BOTH
def test_a_step_waits_for_nothing_and_brings_nothing_from_the_host(method):
    """On a device without data: reading a tensor, or a shape that depends on one, is an error."""
    model, token = tiny_model("qwen3"), torch.zeros(2, 1, dtype=torch.long, device="meta")
    with kvcomp.patch(model, method, max_tokens=ROOM) as run, torch.no_grad():
        cache = run.new_cache()
        model(padded_batch()["input_ids"], past_key_values=cache)
        to_meta(model, cache)
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
        step = captured_step(model)
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
    batch = padded_batch()
    with kvcomp.patch(qwen3, DELTA) as run:
        expected = list(turns(qwen3, run, batch))
    with kvcomp.patch(qwen3, DELTA, max_tokens=ROOM) as run:
        for got, want in zip(turns(qwen3, run, batch), expected, strict=True):
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
        with pytest.raises(ValueError, match=r"holds 21 tokens and 21 more do not fit"):
            qwen3(batch["input_ids"], past_key_values=cache)
        position = batch["attention_mask"].sum(1, keepdim=True)
        for step, token in enumerate(expected[:, 21:].T):
            if step == 9:
                with pytest.raises(ValueError, match=r"holds 30 tokens and 1 more do not fit"):
                    qwen3(token[:, None], past_key_values=cache)
                break
            out = qwen3(token[:, None], position_ids=position + step, past_key_values=cache)
        assert torch.equal(out.logits[:, -1].argmax(-1), expected[:, -1])
        with pytest.raises(ValueError, match="cannot take tokens back"):
            cache.crop(-1)
        one = {name: tensor[1:, :5] for name, tensor in batch.items()}
        with pytest.raises(ValueError, match="assisted decoding"):
            generate(qwen3, one, max_new_tokens=5, prompt_lookup_num_tokens=3, eos_token_id=2)
        hidden = torch.ones(2, 25, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask"):
            qwen3(batch["input_ids"][:, :4], attention_mask=hidden, past_key_values=run.new_cache())


@pytest.mark.parametrize("freeze", [False, True], ids=["linear_rows", "freeze"])
def test_code_for_the_cpu_gives_the_logits_of_eager_steps(freeze, monkeypatch):
    """By inductor itself: with the weights as they are, and packed, without linear_rows."""
    if freeze:
        monkeypatch.delattr(linear.ops, "linear_rows")
    model, batch = tiny_model("llama"), padded_batch()
    expected, _ = reference(model, Full(), batch)
    with kvcomp.patch(model, Full(), max_tokens=ROOM) as run:
        step = run.compile(fullgraph=True, freeze=freeze)
        got = decode(model, batch, run.new_cache(), step)
        assert counters["stats"]["unique_graphs"] == 1 and not linear.packing
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_code_is_kept_by_version_and_kind_of_cpu(monkeypatch, tmp_path):
    """Inductor's own folder does not tell kinds of CPU apart."""
    monkeypatch.setenv("KVCOMP_CACHE", str(tmp_path))
    kinds = set()
    for kind in ("AVX2", "AVX512"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=kind: kind)
        keep_code()
        kinds.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    keep_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] in kinds, "one that is named stays"
    assert len(kinds) == 2 and all(torch.__version__ in path for path in kinds)
    assert all(path.startswith(str(tmp_path)) for path in kinds)


def test_only_weights_on_a_cpu_are_packed():
    model = tiny_model("llama").to("meta")
    expected = pytest.raises(ValueError, match="compile: freeze: expected a model on a CPU")
    with kvcomp.patch(model, Full(), max_tokens=ROOM) as run, expected:
        run.compile(freeze=True)
