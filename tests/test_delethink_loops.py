"""Delethink in loops of one's own: caches that are copied, filled in pieces, forked, or fail."""

import copy
import itertools

import pytest
import torch

import kvcomp
from delethink_texts import (
    SHORT,
    assert_close,
    dictate,
    generate,
    method_of,
    ragged,
    slow_logits,
    some_output,
)
from kvcomp import Delethink
from kvcomp.cache.background import Background
from kvcomp.testing.models import tiny_model
from slow import delethink as slow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.mark.parametrize("reset", ["prefill", "streaming", "rotate"])
def test_a_cache_that_is_copied_or_reset(llama, reset):
    """In the middle of the first and of a later chunk, and where a boundary comes next."""
    batch, output = ragged(14, 9), some_output(2, 27)
    copies = []

    def look(cache, step):
        if step in (8, 12, 17):
            copies.append((step, copy.deepcopy(cache)))

    with kvcomp.patch(llama, Delethink(**SHORT, reset=reset, piece=1)) as run, torch.no_grad():
        cache = run.new_cache()
        want = dictate(llama, run, batch, output, look, cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(dictate(llama, run, batch, output, cache=cache), want)
        for step, copied in copies:
            assert copied.get_seq_length() == 14 + step
            assert not copied.context.kv.beside
            for later in range(step, 26):
                got = llama(output[:, later : later + 1], past_key_values=copied).logits
                assert_close(got, want[:, later + 1 : later + 2])


def test_a_prompt_that_is_half_in_the_cache(llama):
    """The recipe for prefix caching: fill once, deep-copy, continue each copy."""
    batch = ragged(14, 9)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with kvcomp.patch(llama, Delethink(**SHORT)) as run, torch.no_grad():
        whole = generate(llama, batch, 20)
        filled = run.new_cache()
        llama(ids[:, :8], attention_mask=mask[:, :8], past_key_values=filled)
        for _ in range(2):
            copied = copy.deepcopy(filled)
            assert torch.equal(generate(llama, batch, 20, past_key_values=copied), whole)


def test_a_prompt_in_pieces_without_positions(llama):
    """Padding counts for nothing, whether the mask is said once or at every step."""
    batch, output = ragged(14, 9), some_output(2, 30)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with kvcomp.patch(llama, Delethink(**SHORT)) as run, torch.no_grad():
        want = dictate(llama, run, batch, output)
        cache = run.new_cache()
        llama(ids[:, :8], attention_mask=mask[:, :8].bool(), past_key_values=cache)
        llama(ids[:, 8:], past_key_values=cache)
        for step in range(29):
            longer = torch.nn.functional.pad(mask, (0, step + 1), value=1)
            token = output[:, step : step + 1]
            got = llama(token, attention_mask=longer, past_key_values=cache).logits
            assert_close(got, want[:, step + 1 : step + 2])


# --- what goes wrong --------------------------------------------------------------------------


def test_the_longest_prompt_that_fits(llama):
    """A token more is refused; and a run that has refused goes on."""
    batch = ragged(9, 14)
    before = generate(llama, batch, 20)
    with kvcomp.patch(llama, Delethink(**SHORT)):
        with pytest.raises(ValueError, match="a context of 513; the model knows 512 positions"):
            generate(llama, ragged(500), 5)
        generate(llama, ragged(499), 5)
        assert torch.equal(generate(llama, batch, 13), before[:, :13])
    assert torch.equal(generate(llama, batch, 20), before)


def test_what_a_loop_of_ones_own_refuses(llama):
    """Each with one error, after which the cache goes on as if nothing had been asked."""
    batch, output = ragged(9, 14), some_output(2, 27)
    mask = batch["attention_mask"]
    with kvcomp.patch(llama, Delethink(**SHORT | {"max_chunks": 3})) as run, torch.no_grad():
        want = dictate(llama, run, batch, output)
        cache = run.new_cache()
        for bool_or_int in (mask.flip(1), mask.flip(1).bool()):
            with pytest.raises(ValueError, match="padding on the left only"):
                llama(batch["input_ids"].flip(1), bool_or_int, past_key_values=cache)
        llama(**batch, past_key_values=cache)
        for step in range(26):
            token = output[:, step : step + 1]
            if step in (0, 4, 12, 13):
                sits_out = torch.nn.functional.pad(mask, (0, step + 1), value=1)
                sits_out[0, -1] = 0
                with pytest.raises(ValueError, match="a row cannot skip a step"):
                    llama(token, attention_mask=sits_out, past_key_values=cache)
                with pytest.raises(ValueError, match=f"expected {15 + step} columns"):
                    llama(token, attention_mask=mask, past_key_values=cache)
            if step in (4, 12):
                with pytest.raises(ValueError, match="one new token at a time"):
                    llama(output[:, :2], past_key_values=cache)
            got = llama(token, past_key_values=cache).logits
            assert_close(got, want[:, step + 1 : step + 2])
        for _ in range(2):
            with pytest.raises(ValueError, match="max_chunks=3 chunks are full, with 27 tokens"):
                llama(output[:, -1:], past_key_values=cache)
        assert cache.get_seq_length() == 14 + 26
    generate(llama, batch, 5)


@pytest.mark.parametrize(
    ("reset", "inner"),
    [
        *((reset, None) for reset in ("prefill", "streaming", "rotate")),
        *((reset, kvcomp.LazyEviction.example(16)) for reset in ("prefill", "streaming")),
    ],
)
def test_rows_leave_and_fork_in_the_middle_of_a_chunk(llama, reset, inner):
    """What stays goes on as if it had always been alone, and so do both copies of a row."""
    batch, output = ragged(9, 14, 11), some_output(3, 40)
    method = Delethink(**SHORT, reset=reset, piece=2, inner=inner)
    with kvcomp.patch(llama, method) as run:
        want = dictate(llama, run, batch, output)
        for when in (0, 5, 12, 13, 20):
            rows = torch.tensor([2, 0, 2])
            cache = run.new_cache()
            with torch.no_grad():
                llama(**batch, past_key_values=cache)
                for step in range(39):
                    if step == when:
                        cache.batch_select_indices(rows)
                    token = output[:, step : step + 1]
                    token = token if step < when else token[rows]
                    got = llama(token, past_key_values=cache).logits
            assert_close(got, want[rows, -1:])


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_what_the_background_raises_reaches_the_caller(llama, failing, monkeypatch):
    """Whichever of the four pieces it is; and the broken context is not used when one goes on."""
    batch, output = ragged(9, 14), some_output(2, 40)
    method = Delethink(20, 10, max_chunks=None, head=0, reset="streaming", piece=2)
    submit, count = Background.submit, itertools.count(1)

    def failing_submit(self, work, *tensors):
        number = next(count)

        def fails():
            work()
            raise RuntimeError("in the background")

        return submit(self, fails if number == failing else work, *tensors)

    monkeypatch.setattr(Background, "submit", failing_submit)
    monkeypatch.setattr(Background, "busy", False)  # pieces as soon as they are known
    with kvcomp.patch(llama, method) as run, pytest.raises(RuntimeError, match="in the background"):
        generate(llama, batch, 60)
    count = itertools.count(1)
    want = slow_logits(method, batch, output, slow.plain(llama))
    errors = 0
    with kvcomp.patch(llama, method) as run, torch.no_grad():
        cache = run.new_cache()
        llama(**batch, past_key_values=cache)
        for step, token in enumerate(output[:, :-1].split(1, 1), 1):
            try:
                got = llama(token, past_key_values=cache).logits
            except RuntimeError:
                errors += 1
                assert cache.get_seq_length() == 14 + step - 1
                got = llama(token, past_key_values=cache).logits
            assert_close(got, want[:, step : step + 1])
    assert errors == 1


def test_a_boundary_that_fails_can_be_tried_again(llama, monkeypatch):
    """Out of memory in the third of the layers, say, while the carry is encoded."""
    batch, output, method = ragged(9, 14), some_output(2, 30), method_of("carry-below-half")
    want = slow_logits(method, batch, output, slow.plain(llama))
    with kvcomp.patch(llama, method) as run, torch.no_grad():
        cache = run.new_cache()
        llama(**batch, past_key_values=cache)
        for step, token in enumerate(output[:, :-1].split(1, 1), 1):
            if step == method.chunk:
                failed = cache.context.kv.layers[2], "append"
                with monkeypatch.context() as patched:
                    patched.setattr(*failed, lambda *args: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        llama(token, past_key_values=cache)
            got = llama(token, past_key_values=cache).logits
            assert_close(got, want[:, step : step + 1])
