"""A slow reading of Delethink: lists of token ids, one row at a time, and a cold cache for every
chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

Respond = Callable[[list[int], int], tuple[list[int], bool]]


def chunks(method, question: list[int], respond: Respond, most: int) -> list[tuple[list, list]]:
    """(prompt, response) of every chunk; the output is what the responses say one after another.

    Args:
        respond: (prompt, limit) -> up to `limit` new tokens, and whether the last is an EOS.
        most: new tokens, of all chunks.
    """
    head, carry, done = [], [], []
    tail = method.carry - (method.head if method.variant == "exact_bound" else 0)
    for number in itertools.count(1):
        limit = min(method.chunk if number == 1 else method.chunk - method.carry, most)
        prompt = question + head + carry
        response, ended = respond(prompt, limit)
        done.append((prompt, response))
        most -= len(response)
        if ended or not most or number == method.max_chunks:
            return done
        if number == 1:
            head = response[: method.head]
        carry = (carry + response)[-tail:]


def think(method, question: list[int], respond: Respond, most: int) -> list[int]:
    """The output of all chunks."""
    return sum((response for _, response in chunks(method, question, respond, most)), [])


def stock(model, **options) -> Respond:
    """Responses by the model's own `generate`."""

    def respond(prompt, limit):
        ids = torch.tensor([prompt])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        response = model.generate(**given, max_new_tokens=limit)[0, len(prompt) :].tolist()
        return response, response[-1] == options["eos_token_id"]

    return respond


def stepwise(model, run, method=None) -> Respond:
    """Greedy responses on a cache of `run`, which is fresh for every chunk.

    As Delethink does, all but the last token of a carry comes in at once, and the last one as a
    decode step.
    """

    def respond(prompt, limit):
        raise NotImplementedError

    return respond
