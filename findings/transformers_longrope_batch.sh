#!/usr/bin/env bash
# transformers 5.23.0: rotary positions of the types `longrope` (Phi-3 and Phi-4-mini with long contexts)
# and `dynamic` (NTK) take their frequencies from the largest position in the batch. Two results surprise:
#   * A short request gets other logits when its neighbour in the batch is long. Padding alone changes
#     nothing, and neither does a neighbour with `yarn`.
#   * A decoding loop of one's own, with a cache, goes wrong at the switch (4096 tokens for Phi-4-mini):
#     older keys keep the short frequencies and the queries use the long ones. `generate` of a Phi-3 throws
#     its cache away at that length and computes it anew; that of a Llama with `longrope` or `dynamic`
#     mixes both without a warning about it.
#
# Seen: differences between 0.2 and 2.2 in logits whose largest is about 2; 0.00001 or less elsewhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

print("transformers", transformers.__version__, "torch", torch.__version__)
SWITCH, PADDING = 32, 50  # the length at which the frequencies change, and the pads before the short row
SHORT = torch.arange(3, 13)
LONG = torch.arange(PADDING + len(SHORT)) % 50 + 3


def made(kind: str, family: str = "llama") -> PreTrainedModel:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    if kind != "dynamic":
        rope["original_max_position_embeddings"] = SWITCH
    shape = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SWITCH if kind == "dynamic" else 4 * SWITCH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": rope,
    }
    if family == "phi3":
        config = Phi3Config(**shape, original_max_position_embeddings=SWITCH)
    else:
        config = LlamaConfig(**shape)
    model = (Phi3ForCausalLM if family == "phi3" else LlamaForCausalLM)(config).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def short_row(model: PreTrainedModel, neighbour: torch.Tensor | None) -> torch.Tensor:
    """Logits after SHORT, left-padded, beside a neighbour or beside itself."""
    row = torch.cat([torch.zeros(PADDING, dtype=torch.long), SHORT])
    ids = torch.stack([row, row if neighbour is None else neighbour])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions).logits[0, -1]


@torch.no_grad()
def by_hand(model: PreTrainedModel) -> torch.Tensor:
    """Logits after LONG, from a loop with a cache."""
    out = model(LONG[None, :27])
    for token in LONG[27:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values)
    return out.logits[0, -1]


def by_generate(model: PreTrainedModel) -> float:
    """How far the last logits of `generate`, whose cache crosses the switch, are from a fresh pass."""
    out = model.generate(
        LONG[None, :27],
        max_new_tokens=33,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return apart(out.logits[-1][0], model(out.sequences[:, :-1]).logits[0, -1])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


MODELS = (("longrope", "phi3"), ("longrope", "llama"), ("dynamic", "llama"), ("yarn", "llama"))
with torch.no_grad():
    for kind, family in MODELS:
        model = made(kind, family)
        alone = model(SHORT[None]).logits[0, -1]
        padded, beside = apart(alone, short_row(model, None)), apart(alone, short_row(model, LONG))
        loop, generated = apart(model(LONG[None]).logits[0, -1], by_hand(model)), by_generate(model)
        print(
            f"{kind:8} {family:5} padded {padded:.6f}, beside a long row {beside:.6f}, "
            f"own loop {loop:.6f}, generate {generated:.6f}"
        )
        assert padded < 1e-4, "changed: padding matters"
        assert (beside > 0.1) == (loop > 0.1) == (kind != "yarn"), "changed: the neighbour or the loop"
        assert (generated > 0.1) == (kind != "yarn" and family != "phi3"), "changed: generate"
PYTHON
