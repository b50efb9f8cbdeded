"""The methods on Gemma 3 270M, in which 3 of 18 layers attend to everything, with heads of 256.

Its terms are the reader's to accept, so nothing here fetches it: `kvcomp get gemma3-270m` does.
"""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import kvcomp
from kvcomp import METHODS, models
from kvcomp.hf.layer import Layer

NAME = "gemma3-270m"
PROMPTS = [  # padded on the left; the second is longer than a window of 512 tokens
    "There are many countries in Europe, and all have a capital. The capital of France is",
    "Water is a liquid at the temperatures that people like. It boils at 100 degrees Celsius. " * 30
    + "Ice melts at",
]
COVERING = ["full", "delta", "lazy-eviction", "louis-kv", "h2o", "quest"]


@pytest.fixture(scope="module")
def model(one_thread):
    if not models.installed(NAME):
        pytest.skip(f"not fetched: kvcomp get {NAME} --accept-terms")
    folder = str(models.path(NAME))
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found.eval()


@pytest.fixture(scope="module")
def inputs(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(models.path(NAME)), padding_side="left"
    )
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


def greedy(model, inputs):
    return model.generate(
        **inputs,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.fixture(scope="module")
def stock(model, inputs):
    return greedy(model, inputs)


def test_it_is_the_model(model, inputs, stock):
    assert model.config.head_dim == 256
    kinds = model.config.layer_types
    assert (len(kinds), kinds.count("full_attention")) == (18, 3)
    assert inputs["input_ids"].shape[1] > model.config.sliding_window
    assert not bool(inputs["attention_mask"].all())


@pytest.mark.parametrize("name", COVERING)
def test_a_covering_budget_is_stock_attention_over_padded_prompts(model, inputs, stock, name):
    with kvcomp.patch(model, METHODS[name].example(1024)) as run:
        ours = greedy(model, inputs)
        managed = [layer for layer in ours.past_key_values.layers if isinstance(layer, Layer)]
    assert len(managed) == 3
    assert run.report().tokens_decoded == 2 * 7
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)


def test_delta_leaves_two_of_the_three_layers_sparse(model, inputs):
    with kvcomp.patch(model, kvcomp.Delta(budget=128)) as run:
        greedy(model, {name: ids[1:] for name, ids in inputs.items()})
    full, *sparse = (layer["tokens_attended"] for layer in run.report(layers=True).layers)
    assert len(sparse) == 2 and max(sparse) <= 128 < 512 < full


def test_undo_leaves_nothing(model, inputs, stock):
    assert torch.equal(greedy(model, inputs).sequences, stock.sequences)
