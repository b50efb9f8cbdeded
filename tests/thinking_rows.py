"""A prompt of many rows, and the methods under which rows are tried."""

import torch

import kvcomp

METHODS = {
    "full": kvcomp.Full(),
    "delta": kvcomp.Delta.example(32),
    "lazy": kvcomp.LazyEviction.example(32),
    "louis": kvcomp.LouisKV.example(32),
    "delethink": kvcomp.Delethink(chunk=16, carry=8, head=2, max_chunks=None),
    "streaming": kvcomp.Delethink(chunk=16, carry=8, head=2, max_chunks=None, reset="streaming"),
}
WARM = {"temperature": 1.0, "top_p": 1.0}


def prompt(count=20, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(30, 120, (1, count), generator=generator)}
