"""Decode prompts under a method, one by one. Calibrations use this."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp.hf.patch import patch
from kvcomp.methods import Method


def decode_all(
    model: PreTrainedModel,
    prompts: list,
    method: Method,
    *,
    tokenizer: Any = None,
    max_new_tokens: int,
) -> list[Tensor]:
    """Decode every prompt greedily and by itself under `method`.

    Args:
        prompts: texts (with `tokenizer`), or token ids as lists or 1-D tensors.

    Returns:
        The new token ids of each prompt, [tokens] int64.

    Raises:
        TypeError: one prompt instead of several.
        ValueError: no prompts, or texts without a tokenizer.
    """
    one = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim < 2)
    if one or any(isinstance(prompt, int) for prompt in prompts):
        raise TypeError(
            "kvcomp: prompts: expected several, each a text or token ids, got one:"
            f" {type(prompts).__name__}"
        )
    if not len(prompts):
        raise ValueError("kvcomp: prompts: expected at least one, got none")
    generative: Any = model  # its type has no `generate`
    outputs = []
    with patch(model, method):
        for prompt in prompts:
            ids = _ids(model, prompt, tokenizer)
            out = generative.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
            )
            outputs.append(out[0, ids.shape[1] :])
    return outputs


def answer_loss(
    model: PreTrainedModel,
    prompts: list,
    answers: Sequence[Tensor],
    method: Method,
    *,
    tokenizer: Any = None,
) -> float:
    """Mean negative log-likelihood of given answers, read token by token under `method`.

    Args:
        prompts: as for `decode_all`.
        answers: token ids of each answer, [tokens] int64.

    Returns:
        Nats per token, over all tokens but the first, which the prefill predicts.
    """
    losses = torch.cat(answer_losses(model, prompts, answers, method, tokenizer=tokenizer))
    return losses.double().mean().item() if len(losses) else 0.0


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel,
    prompts: list,
    answers: Sequence[Tensor],
    method: Method,
    *,
    tokenizer: Any = None,
) -> list[Tensor]:
    """`answer_loss` of each answer and token: [tokens - 1] fp32 on the CPU. Prompts and answers of
    the same lengths are read together."""
    if len(prompts) != len(answers):
        expected = f"one for each of the {len(prompts)} prompts"
        raise ValueError(f"kvcomp: answers: expected {expected}, got {len(answers)}")
    rows = [_ids(model, prompt, tokenizer)[0] for prompt in prompts]
    alike: dict[tuple[int, int], list[int]] = {}
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        alike.setdefault((len(row), len(answer)), []).append(place)
    losses = [torch.zeros(0)] * len(rows)
    with patch(model, method) as run:
        for places in alike.values():
            cache = run.new_cache()
            run.decoder(torch.stack([rows[place] for place in places]), past_key_values=cache)
            given = torch.stack([answers[place] for place in places]).to(model.device)
            found = []
            for token, following in itertools.pairwise(given.T):
                out = model(token[:, None], past_key_values=cache)
                logs = out.logits[:, -1].float().log_softmax(-1)
                found.append(-logs.gather(1, following[:, None])[:, 0].cpu())
            for index, place in enumerate(places if found else ()):
                losses[place] = torch.stack(found, 1)[index]
    return losses


def _ids(model: PreTrainedModel, prompt: Any, tokenizer: Any) -> Tensor:
    """[1, tokens] on the model's device."""
    if not isinstance(prompt, str):
        ids = torch.as_tensor(prompt)[None]
    elif tokenizer is None:
        raise ValueError("kvcomp: tokenizer: expected one, as prompts are texts, got None")
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.shape[1]:
        raise ValueError("kvcomp: prompts: expected at least one token in each, got an empty one")
    return ids.to(model.device)
