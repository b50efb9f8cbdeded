"""A run under what happens around it: other attention, an end in the middle, Ctrl-C. Never other
tokens in silence, and nothing stays patched."""

import copy
import dataclasses
import gc
import threading
import weakref
from functools import partial

import pytest
import torch

import kvcomp
from guarded import IDS, WHOLE, every_kind, every_method, generate, name_of
from kvcomp import Delethink, Full, LouisKV
from kvcomp.cache import HostMemoryError
from kvcomp.hf.cache import Cache
from kvcomp.testing.models import tiny_model


@pytest.fixture(scope="module")
def stock():
    return generate(tiny_model("llama"))


class Streamer:
    """Does something after so many tokens, between two forwards of `generate`."""

    def __init__(self, after, act):
        self.left, self.act = after, act

    def put(self, tokens):
        self.left -= 1
        if not self.left:
            self.act()

    def end(self):
        pass


def in_layer(model, act, call=8, layer=1):
    """`act` in the middle of a forward, the `call`-th."""
    calls = []

    def hook(*_):
        calls.append(0)
        if len(calls) == call:
            act()

    return model.model.layers[layer].register_forward_hook(hook)


# --- another attention implementation while patched


def by_method(model):
    model.set_attn_implementation("sdpa")


def by_field(model):
    model.config._attn_implementation = "eager"


def by_config_of_a_layer(model):
    attention = model.model.layers[2].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"


NOTICED = r"attention (implementation )?was (set to|not kvcomp)"


@pytest.mark.parametrize("switch", [by_method, by_field, by_config_of_a_layer])
@every_kind
def test_switched_attention_is_noticed(method, max_tokens, switch, stock):
    model = tiny_model("llama")
    with kvcomp.patch(model, method, max_tokens=max_tokens) as run:
        switch(model)
        with pytest.raises(ValueError, match=NOTICED):
            generate(model)
        assert not run.report().tokens_decoded
    if switch is not by_config_of_a_layer:
        assert torch.equal(generate(model), stock)


@every_method
def test_attention_switched_between_two_tokens(method):
    model = tiny_model("llama")
    with (
        kvcomp.patch(model, method),
        pytest.raises(ValueError, match="was set to 'sdpa' while it is patched"),
    ):
        model.generate(
            IDS[:1],
            do_sample=False,
            eos_token_id=1000,
            max_new_tokens=24,
            streamer=Streamer(5, lambda: by_method(model)),
        )


@pytest.mark.parametrize("method", [m for m in WHOLE if m.static], ids=name_of)
def test_a_compiled_step_notices_both(method):
    model = tiny_model("llama")
    run = kvcomp.patch(model, method, max_tokens=60)
    step, cache = run.compile(backend="eager", fullgraph=True), run.new_cache()
    with torch.no_grad():
        token = step(IDS, past_key_values=cache).logits[:, -1:].argmax(-1)
        by_method(model)
        with pytest.raises(ValueError, match=NOTICED):
            step(token, past_key_values=cache)
        run.undo()
        with pytest.raises(RuntimeError, match="undone"):
            step(token, past_key_values=cache)


# --- undo() while something generates


def by_thread(work):
    """Start a thread; what it returns, or the error that ended it, is in the list afterwards."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def ended(thread):
    thread.join(60)
    assert not thread.is_alive(), "a deadlock"


ONE = {"do_sample": False, "eos_token_id": 1000, "max_new_tokens": 40}


@pytest.mark.parametrize("threads", [1, 2])
@every_method
def test_the_block_is_left_while_threads_generate(method, threads, stock):
    model, running = tiny_model("llama"), []
    with kvcomp.patch(model, method):
        for _ in range(threads):
            some = threading.Event()
            streamer = Streamer(4, some.set)
            long = ONE | {"max_new_tokens": 2000}  # none ends by itself meanwhile
            running.append(by_thread(partial(model.generate, IDS[:1], **long, streamer=streamer)))
            assert some.wait(60)
    assert torch.equal(generate(model), stock)
    for thread, found in running:
        ended(thread)
        assert isinstance(found[0], (ValueError, RuntimeError)), found
        assert "undone" in str(found[0])


@every_kind
def test_undo_between_two_tokens(method, max_tokens, stock):
    model = tiny_model("llama")
    run = kvcomp.patch(model, method, max_tokens=max_tokens)
    with pytest.raises((ValueError, RuntimeError), match="undone"):
        model.generate(IDS[:1], **ONE, streamer=Streamer(5, run.undo))
    assert torch.equal(generate(model), stock)


@every_method
def test_undo_within_a_forward(method, stock):
    """It takes effect when the forward has ended, so that this one is still right."""
    model = tiny_model("llama")
    run = kvcomp.patch(model, method)
    handle = in_layer(model, run.undo, call=1)
    with torch.no_grad():
        first = model(IDS, past_key_values=run.new_cache(), use_cache=True).logits[:, -1].argmax(-1)
    handle.remove()
    assert torch.equal(first, stock[:, IDS.shape[1]])
    assert model.config._attn_implementation == run.inner_name
    assert torch.equal(generate(model), stock)


def test_two_threads_undo_within_their_forwards(stock):
    """Each waits for nobody: the last one to leave ends the run."""
    model = tiny_model("llama")
    run, both = kvcomp.patch(model, Full()), threading.Barrier(2)

    def act():
        both.wait(60)
        run.undo()

    handle = model.model.layers[1].register_forward_hook(lambda *_: act())
    running = [by_thread(lambda: model(IDS, use_cache=True).logits) for _ in range(2)]
    for thread, _ in running:
        ended(thread)
    handle.remove()
    for _, (logits,) in running:
        assert torch.equal(logits[:, -1].argmax(-1), stock[:, IDS.shape[1]])
    assert torch.equal(generate(model), stock)


def test_host_memory_runs_out_while_another_thread_generates(stock):
    model, method = tiny_model("llama"), LouisKV.example(64)
    with kvcomp.patch(model, method) as run:
        model.generate(IDS[:1], **ONE)
    enough = run.report().host_bytes_peak
    run = kvcomp.patch(model, dataclasses.replace(method, host_limit=2 * enough))
    some, refused = threading.Event(), threading.Event()

    def pause():
        some.set()
        refused.wait(60)

    streamer = Streamer(3, pause)
    thread, found = by_thread(partial(model.generate, IDS[:1], **ONE, streamer=streamer))
    assert some.wait(60)
    with pytest.raises(HostMemoryError):
        model.generate(IDS.repeat(1, 20), max_new_tokens=2, do_sample=False)
    refused.set()
    ended(thread)
    assert isinstance(found[0], Exception), found
    assert torch.equal(generate(model), stock)
    run.undo()


# --- Ctrl-C, and other ends in the middle of a forward


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@every_kind
def test_an_end_in_the_middle_of_a_forward(method, max_tokens, kind, stock, monkeypatch):
    """The memory is free, nothing stays patched, and the cache is refused: it is half-filled."""
    made, init = [], Cache.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    def act():
        raise kind("in the middle")

    monkeypatch.setattr(Cache, "__init__", noted)
    model = tiny_model("llama")
    run = kvcomp.patch(model, method, max_tokens=max_tokens)
    handle = in_layer(model, act)
    with pytest.raises(kind, match="in the middle"):
        generate(model)
    if max_tokens is None:  # else the memory is kept for the next call
        gc.collect()
        assert not any(cache() for cache in made)
    handle.remove()
    assert torch.equal(generate(model), stock)  # still patched, and well

    cache = run.new_cache()
    handle = in_layer(model, act)
    with pytest.raises(kind, match="in the middle"):
        generate(model, past_key_values=cache)
    handle.remove()
    other = tiny_model("llama")
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected the model that this cache was made for"):
            other(IDS[:, :1], past_key_values=cache)
        if not isinstance(method, Delethink):
            with pytest.raises(ValueError, match="failed half-way"):
                model(IDS[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.equal(generate(model, past_key_values=cache), stock)
    run.undo()
    gc.collect()
    del cache
    assert not any(cache() for cache in made)
    assert torch.equal(generate(model), stock)


@every_method
def test_a_run_keeps_no_cache(method, monkeypatch):
    made, init = [], Cache.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Cache, "__init__", noted)
    model = tiny_model("llama")
    run = kvcomp.patch(model, method)
    generate(model)
    gc.collect()
    assert not any(cache() for cache in made)
    run.undo()
