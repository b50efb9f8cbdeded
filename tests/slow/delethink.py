"""Slow readings of Delethink: the loop of the paper on token ids, and a cold cache for every chunk.

Rows of a batch go side by side and have no padding. An EOS is not looked for: a test cuts there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from slow.eviction import rotate

Respond = Callable[[Tensor, int], Tensor]


def chunks(method, question: Tensor, respond: Respond, most: int) -> list[tuple[Tensor, Tensor]]:
    """(prompt, response) of every chunk; the output is what the responses say one after another.

    Args:
        question: [B, P] ids.
        respond: (prompt [B, n], limit) -> [B, limit] new ids.
        most: new tokens, of all chunks.
    """
    head = carry = question[:, :0]
    done = []
    tail = method.carry - (method.head if method.variant == "exact_bound" else 0)
    for number in itertools.count(1):
        limit = min(method.chunk if number == 1 else method.chunk - method.carry, most)
        prompt = torch.cat([question, head, carry], 1)
        response = respond(prompt, limit)
        done.append((prompt, response))
        most -= limit
        if not most or number == method.max_chunks:
            return done
        if number == 1:
            head = response[:, : method.head]
        carry = torch.cat([carry, response], 1)[:, -tail:]


def think(method, question: Tensor, respond: Respond, most: int) -> Tensor:
    """The output of all chunks [B, n]."""
    return torch.cat([response for _, response in chunks(method, question, respond, most)], 1)


def stock(model, **options) -> Respond:
    """Responses by the model's own `generate`."""

    def respond(prompt, limit):
        given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": limit, **options}
        return model.generate(prompt, **given)[:, prompt.shape[1] :]

    return respond


def dictated(output: Tensor) -> Respond:
    """Responses that say `output` [B, n]."""
    place = itertools.count()

    def respond(prompt, limit):
        return output[:, [next(place) for _ in range(limit)]]

    return respond


def logits(method, question: Tensor, output: Tensor, forward: Callable) -> Tensor:
    """[B, n, V]: what is predicted in the place of each token of the output.

    Args:
        forward: (number of the chunk, prompt, response [B, n]) -> logits [B, n, V] of a response.
    """
    contexts = chunks(method, question, dictated(output), output.shape[1])
    return torch.cat([forward(number, *each) for number, each in enumerate(contexts)], 1)


def plain(model) -> Callable:
    """Forward of a context as a whole by the model itself, for `logits`."""

    def forward(number, prompt, response):
        with torch.no_grad():
            found = model(torch.cat([prompt, response], 1)).logits
        return found[:, prompt.shape[1] - 1 : -1]

    return forward


def stepwise(model, new_cache: Callable, split: Callable) -> Callable:
    """Forward of a context on a cold cache, for `logits`.

    Args:
        split: (number of the chunk, length of its prompt) -> lengths of the pieces in which the
            prompt comes in; the response comes token by token.
    """

    def forward(number, prompt, response):
        pieces = [*split(number, prompt.shape[1]), *[1] * response.shape[1]]
        cache, found = new_cache(), []
        with torch.no_grad():
            for ids in torch.cat([prompt, response], 1).split(pieces, 1):
                found.append(model(ids, past_key_values=cache).logits[:, -1:])
        return torch.cat(found[-1 - response.shape[1] : -1], 1)

    return forward


def rotated(model, method, question: Tensor, output: Tensor, inv_freq: Tensor) -> Tensor:
    """`logits` with reset="rotate": one cache of the model's own, cut and rotated by hand."""
    cache, found = DynamicCache(config=model.config), []
    turned = 2 * len(inv_freq)
    with torch.no_grad():
        found.append(model(question, past_key_values=cache).logits[:, -1:])
        for number, (prompt, response) in enumerate(
            chunks(method, question, dictated(output), output.shape[1])
        ):
            if number:
                prefix = question.shape[1] + method.head
                carried = prompt.shape[1] - prefix - 1  # the last token comes in below
                for layer in cache.layers:
                    shift = prompt.shape[1] - 1 - layer.keys.shape[2]
                    kept = layer.keys[:, :, layer.keys.shape[2] - carried :]
                    moved = torch.cat(
                        [turn(kept[..., :turned], shift, inv_freq), kept[..., turned:]], -1
                    )
                    layer.keys = torch.cat([layer.keys[:, :, :prefix], moved], 2)
                    values = layer.values[:, :, layer.values.shape[2] - carried :]
                    layer.values = torch.cat([layer.values[:, :, :prefix], values], 2)
                found.append(model(prompt[:, -1:], past_key_values=cache).logits)
            for place in range(response.shape[1] - 1):
                token = response[:, place : place + 1]
                found.append(model(token, past_key_values=cache).logits)
    return torch.cat(found, 1)


def turn(keys: Tensor, shift: int, inv_freq: Tensor) -> Tensor:
    """keys [B, H, n, R] moved by `shift` positions, in float64 between."""
    rows = [rotate(row, [shift] * keys.shape[2], inv_freq) for row in keys]
    return torch.stack(rows).to(keys.dtype)
