"""A padded batch of two rows, and methods whose budgets cover it, so that all give the tokens of
the model."""

import torch

from kvcomp import Delethink, Delta, Full, LazyEviction, LouisKV

WIDTH, PAD, STEPS, NEVER = 24, 9, 12, 4096
COVERING = {
    "full": Full(),
    "delta": Delta.example(256),
    "lazy-eviction": LazyEviction.example(256),
    "louis-kv": LouisKV.example(256),
    "delethink": Delethink(64, 16, head=4),
}
IDS = torch.randint(3, 100, (2, WIDTH), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :PAD] = 0


def generate(model, ids=IDS, mask=MASK, **options):
    """Greedily, for STEPS tokens; none of them ends the text."""
    given = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": NEVER, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **given)
