"""Runs of every kind whose tokens are those of the model without kvcomp."""

import dataclasses

import pytest
import torch

from kvcomp import METHODS, Delethink, Delta, Full, LazyEviction, LouisKV

IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(1))
GO = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "eos_token_id": 1000}
WHOLE = [  # with budgets for everything: the tokens of the model without kvcomp
    Full(),
    Delta(budget=4096, delta_layers=(2,)),
    LazyEviction(budget=4096),
    LouisKV(budget=4096, sinks=2, dense_layers=1),
    METHODS["h2o"].example(4096),
    dataclasses.replace(METHODS["quest"].example(24), budget=4096),
    Delethink(400, 100, head=4),
]
KINDS = [
    *((method, None) for method in WHOLE),
    *((method, 100) for method in WHOLE if method.static),
]


def name_of(value):
    return getattr(value, "name", None)


every_kind = pytest.mark.parametrize(("method", "max_tokens"), KINDS, ids=name_of)
every_method = pytest.mark.parametrize("method", WHOLE, ids=name_of)


def generate(model, steps=24, **options):
    return model.generate(IDS, max_new_tokens=steps, **{**GO, **options})
