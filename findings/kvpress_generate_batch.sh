#!/usr/bin/env bash
# kvpress 0.5.5 with transformers 5.2.0: a press may be used as a context manager around
# `model.generate`, its README says. In two cases the model then sees other tokens than the press kept:
#   * Rows padded on the left. The attention mask is still the one of the whole prompt, cut to the length
#     of the compressed cache. So a row with 20 pads has its first 20 kept tokens masked out, and the pads
#     that a press kept behind these count as text. StreamingLLMPress keeps the four first pads as sinks.
#     A row's answer differs from its answer alone; without a press, and at ratio 0, it does not.
#   * KeyRerotationPress, which gives the kept keys the positions 0, 1, 2 ... The queries go on at the
#     position after the whole prompt, so the last token of the prompt, which is always kept here, is 31
#     away and not 1. kvpress's own pipeline counts on from the compressed length.
#
# Seen: KnormPress keeps 20 tokens of text and 20 pads, 16 and 4 of them visible; StreamingLLMPress 36 and
# 4, 18 and 2 visible; logits 5 to 6 apart. With KeyRerotationPress the last key is at 29, the query at 60.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.2.0 kvpress==0.5.5
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
from contextlib import nullcontext
from importlib.metadata import version

import torch
from kvpress import KeyRerotationPress, KnormPress, StreamingLLMPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

print("kvpress", version("kvpress"), "transformers", version("transformers"), "torch", torch.__version__)
LENGTH, PADS = 60, 20
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
    )
).eval()
for name, weight in model.named_parameters():
    if "norm" not in name:
        torch.nn.init.normal_(weight, std=0.15)
row, longer = torch.randint(3, 64, (LENGTH,)), torch.randint(3, 64, (PADS + LENGTH,))
batch = torch.stack([torch.cat([torch.zeros(PADS, dtype=torch.long), row]), longer])
watched = {}


def watch(module, args, kwargs) -> None:
    mask = kwargs["attention_mask"]
    if kwargs["hidden_states"].shape[1] == 1:  # a step after the prompt
        watched.setdefault("position", kwargs["position_ids"][0, -1].item())
        watched.setdefault("mask", None if mask is None else mask)


def second_logits(press, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the first row's second new token, the first one from the compressed cache."""
    watched.clear()
    with nullcontext() if press is None else press(model):
        out = model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.logits[1][0]


@torch.no_grad()
def kept_places(press) -> list[int]:
    """Places in the batch's prompt of what the first head of the first layer keeps of the first row."""
    mask = (batch != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    keys = []
    for context in (nullcontext(), press(model)):
        cache = DynamicCache()
        with context:
            model(batch, attention_mask=mask, position_ids=positions, past_key_values=cache)
        keys.append(cache.layers[0].values[0, 0])
    # Pads have equal values: the k-th one kept stands for the k-th pad.
    places, pads = [], 0
    for value in keys[1]:
        place = (keys[0] - value).abs().sum(-1).argmin().item()
        places.append(pads if place < PADS else place)
        pads += place < PADS
    return places


model.model.layers[0].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
for press in (None, KnormPress(0.0), KnormPress(0.5), StreamingLLMPress(0.5, n_sink=4)):
    difference = (second_logits(press, row[None]) - second_logits(press, batch)).abs().max().item()
    name = type(press).__name__ if press else "no press"
    ratio = press.compression_ratio if press else 0.0
    print(f"{name} at {ratio}: logits of the padded row and of the row alone {difference:.4f} apart")
    assert (difference > 0.5) == (ratio > 0), "changed: padded rows"
    if ratio == 0:
        continue
    kept, mask = kept_places(press), watched["mask"][0, 0, 0]
    visible = (mask if mask.dtype == torch.bool else mask == 0)[: len(kept)].tolist()
    text = [place >= PADS for place in kept]
    seen = sum(t and v for t, v in zip(text, visible, strict=True))
    print(
        f"   keeps {len(kept)} of {len(batch[0])}: {sum(text)} tokens of text, of which {seen} are visible, "
        f"and {len(kept) - sum(text)} pads, of which {sum(visible) - seen} are visible"
    )
    assert not any(visible[:PADS]) and seen < sum(text), "changed: the mask"

press = KeyRerotationPress(StreamingLLMPress(0.5, n_sink=4))
second_logits(press, row[None])
print(f"KeyRerotationPress at 0.5: keys at 0 to {LENGTH // 2 - 1}, the first query at {watched['position']}")
assert watched["position"] == LENGTH, "changed: positions"
PYTHON
