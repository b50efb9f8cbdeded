"""A small model and a tokenizer of few words, for every file here."""

import pytest

from kvcomp.testing.models import tiny_model
from toy_words import toy_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def words():
    return toy_tokenizer()
