"""A cache kept from one turn to the next: the text must be the one that it has seen."""

import pytest
import torch

import kvcomp
from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV
from kvcomp.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(1))
MORE = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(2))
STEPS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 1000}
KEEPING = [name for name in METHODS if name != "delethink"]
SEEN = IDS.shape[1] + STEPS["max_new_tokens"] - 1  # the last new token has not come in


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=6)


def small(name):
    return METHODS[name].example(*(() if name == "full" else (24,)))


def turn(model, ids, cache=None, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = STEPS | {"return_dict_in_generate": True} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def another_text(sequences):
    """The answer cut out, as chat templates cut out a thought."""
    return torch.cat([sequences[:, : IDS.shape[1] + 3], MORE, MORE], 1)


@pytest.mark.parametrize("max_tokens", [None, 90])
@pytest.mark.parametrize("name", KEEPING)
def test_another_text_is_refused_and_continued_from_where_it_begins(llama, name, max_tokens):
    method = small(name)
    if max_tokens and not method.static:
        pytest.skip("no static cache")
    with kvcomp.patch(llama, method, max_tokens=max_tokens) as run:
        first = turn(llama, IDS)
        cache, ids = first.past_key_values, another_text(first.sequences)
        assert int(cache.get_seq_length()) == SEEN
        with pytest.raises(ValueError, match=f"another one from token 24 of {SEEN}.*continue_from"):
            turn(llama, ids, cache)
        assert int(cache.get_seq_length()) == SEEN
        assert run.continue_from(cache, ids) is cache
        kept = int(cache.get_seq_length())
        if max_tokens or not method.croppable:
            assert kept in (0, IDS.shape[1])
        else:
            assert kept == 24
        got = turn(llama, ids, cache).sequences
        if kept == 0:
            assert torch.equal(got, turn(llama, ids).sequences)


@pytest.mark.parametrize("name", ["full", "delta"])
def test_a_text_continued_is_as_from_its_beginning(llama, name):
    """Where everything is kept and read, in a padded batch, and with tokens to choose once more."""
    method = Full() if name == "full" else Delta(budget=256, page_size=16, recent=2, warmup=1)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    with kvcomp.patch(llama, method) as run:
        first = turn(llama, IDS, mask=mask)
        ids = another_text(first.sequences)
        whole = torch.cat([mask, torch.ones(2, ids.shape[1] - IDS.shape[1], dtype=torch.long)], 1)
        cache = run.continue_from(first.past_key_values, ids, whole)
        assert cache.get_seq_length() == 24
        assert torch.equal(
            turn(llama, ids, cache, whole).sequences, turn(llama, ids, mask=whole).sequences
        )
        same = run.continue_from(cache, ids, whole)  # shorter than what it has seen
        assert same.get_seq_length() == ids.shape[1] - 1
        shifted = whole.clone()
        shifted[0, 6] = 0
        assert run.continue_from(cache, ids, shifted).get_seq_length() == 6
        assert run.continue_from(cache, ids[:1]).get_seq_length() == 0


def test_the_same_text_goes_on(llama):
    with kvcomp.patch(llama, Full()) as run:
        first = turn(llama, IDS)
        ids = torch.cat([first.sequences, MORE], 1)
        cache = run.continue_from(first.past_key_values, ids)
        assert cache.get_seq_length() == SEEN
        assert torch.equal(turn(llama, ids, cache).sequences, turn(llama, ids).sequences)


@pytest.mark.parametrize("name", ["full", "lazy-eviction", "louis-kv"])
def test_rows_of_the_text_move_with_the_cache(llama, name):
    with kvcomp.patch(llama, small(name)):
        first = turn(llama, IDS, num_beams=3, num_return_sequences=1)
        again = torch.cat([first.sequences, MORE], 1)
        cache = first.past_key_values
        cache.batch_select_indices(torch.tensor([0, 3]))
        again = torch.cat([cache.text.known(SEEN), MORE], 1)
        more = torch.cat([turn(llama, again, cache).sequences, MORE], 1)
        more[1, 2] += 1
        with pytest.raises(ValueError, match="row 1 is another one from token 2"):
            turn(llama, more, cache)


def test_embeddings_are_no_text_that_could_be_told_apart(llama):
    with kvcomp.patch(llama, Full()) as run, torch.no_grad():
        cache = run.new_cache()
        llama(inputs_embeds=llama.get_input_embeddings()(IDS), past_key_values=cache)
        turn(llama, torch.cat([IDS.flip(1), MORE], 1), cache)
        assert run.continue_from(cache, IDS).get_seq_length() == 0
        cache = turn(llama, IDS, cache).past_key_values  # begun anew, with ids
        with pytest.raises(ValueError, match="from token 0"):
            turn(llama, torch.cat([IDS.flip(1), MORE, MORE], 1), cache)


@pytest.mark.parametrize("method", [Full(), LazyEviction.example(24), LouisKV.example(24)])
def test_new_tokens_alone_need_the_mask_of_all(llama, method):
    new = torch.cat([MORE, MORE, MORE, MORE, MORE], 1)
    with kvcomp.patch(llama, method):
        cache = turn(llama, IDS).past_key_values
        with pytest.raises(ValueError, match=rf"7 tokens.*seen {SEEN}.*attention_mask of all 39"):
            turn(llama, MORE, cache)
        with pytest.raises(ValueError, match="another one from token 0"):
            turn(llama, new, cache)
        assert cache.get_seq_length() == SEEN
        turn(llama, MORE, cache, torch.ones(2, SEEN + 7, dtype=torch.long))
        assert cache.get_seq_length() == SEEN + 7 + STEPS["max_new_tokens"] - 1


@pytest.mark.parametrize("method", [Full(), Delethink(400, 100, head=4)], ids=["full", "delethink"])
def test_copies_of_rows_that_the_cache_does_not_have(llama, method):
    with kvcomp.patch(llama, method) as run, torch.no_grad():
        cache = run.new_cache()
        llama(IDS, past_key_values=cache)
        ids = torch.cat([IDS, MORE], 1)
        with pytest.raises(ValueError, match="it holds 2 sequences, but generate decodes 6"):
            turn(llama, ids, cache, do_sample=True, num_return_sequences=3)
        assert cache.get_seq_length() == IDS.shape[1]
        if method.croppable:
            cache.batch_repeat_interleave(3)
            turn(llama, ids, cache, do_sample=True, num_return_sequences=3)


def test_delethink_starts_anew(llama):
    with kvcomp.patch(llama, Delethink(40, 20, head=4)) as run, torch.no_grad():
        cache = run.new_cache()
        llama(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="row 0 is another one from token 0"):
            turn(llama, torch.cat([IDS.flip(1), MORE], 1), cache)
        first = turn(llama, torch.cat([IDS, MORE], 1), cache)
        ids = torch.cat([first.sequences, MORE], 1)
        cache = run.continue_from(first.past_key_values, ids)
        assert cache.get_seq_length() == 0
        assert torch.equal(turn(llama, ids, cache).sequences, turn(llama, ids).sequences)


# What a cache says of its length, and takes back.


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_a_length_stays_what_it_was(llama, max_tokens):
    with kvcomp.patch(llama, Full(), max_tokens=max_tokens) as run, torch.no_grad():
        cache = run.new_cache()
        llama(IDS, past_key_values=cache)
        length = cache.get_seq_length()
        for _ in range(3):
            llama(IDS[:, :1], past_key_values=cache)
        assert length == 21 and cache.get_seq_length() == 24


def test_crop_takes_the_number_of_tokens_to_take_back(llama):
    with kvcomp.patch(llama, Full()) as run, torch.no_grad():
        cache = run.new_cache()
        llama(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="minus the number of tokens to take back, got 5"):
            cache.crop(5)
        cache.crop(-5)
        assert cache.get_seq_length() == 16
        cache.crop(0)
        assert cache.get_seq_length() == 16
