"""A padded batch, and models that some transformers cannot make."""

import pytest
import torch
import transformers
from packaging import version

from kvcomp import METHODS
from kvcomp.methods.retrieval import Retrieval
from kvcomp.testing.models import tiny_model

STEPS = 24
RETRIEVALS = [name for name, method in METHODS.items() if issubclass(method, Retrieval)]


def padded_batch(width=21, pad=6):
    """Token ids [2, width] and their mask; the first row is left-padded by `pad`."""
    ids = torch.randint(3, 128, (2, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :pad] = mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch, **options):
    return model.generate(**batch, **{"max_new_tokens": STEPS, "do_sample": False, **options})


def known_model(kind):
    """A tiny model; skips where an older transformers cannot make it."""
    try:
        return tiny_model(kind)
    except ValueError as unknown:
        if version.parse(transformers.__version__) >= version.parse("5.17"):
            raise
        pytest.skip(str(unknown)[:80])
