"""Methods, prompts and decoding for the tests of strategies that act step by step."""

import torch

import kvcomp

METHODS = {
    "full": kvcomp.Full(),
    "delta": kvcomp.Delta.example(32),
    "lazy": kvcomp.LazyEviction.example(32),
    "louis": kvcomp.LouisKV.example(32),
    "delethink": kvcomp.Delethink(chunk=20, carry=8, head=2, max_chunks=None),
}


def ids(rows=1, count=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, 120, (rows, count), generator=generator)


def decode(model, prompt, *processors, tokens=40, **more):
    more = {"do_sample": False, "eos_token_id": 1000} | more
    mask = torch.ones_like(prompt)
    return model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=tokens,
        logits_processor=list(processors),
        **more,
    )[:, prompt.shape[1] :]
