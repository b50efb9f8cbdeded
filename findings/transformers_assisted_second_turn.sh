#!/usr/bin/env bash
# transformers 5.23.0: generate with prompt_lookup_num_tokens, over a cache that an earlier turn has filled
# and a text that begins with what is in it, encodes the whole text anew behind the cached tokens. Plain
# generate passes on the new tokens only. Afterwards the cache holds the text twice. No warning says so.
# kvcomp: a run hands only the new tokens of a further turn to the model (kvcomp/hf/run.py).
#
# Seen: of a text of 49 tokens, 43 of them cached, plain decoding encodes 6; prompt lookup encodes 49 and
# 3 candidates, and its cache ends with 95 tokens for a text of 53.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", version("transformers"), "torch", version("torch"))
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
prompt, question = torch.randint(3, 32, (1, 40)), torch.randint(3, 32, (1, 5))
common = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
encoded = []
model.model.register_forward_pre_hook(
    lambda module, args, given: encoded.append(given["input_ids"].shape[1]), with_kwargs=True
)


def second_turn(**more):
    first = model.generate(prompt, **common)
    text, cache = torch.cat([first.sequences, question], 1), first.past_key_values
    seen = cache.get_seq_length()
    encoded.clear()
    out = model.generate(text, past_key_values=cache, **common, **more)
    found = text.shape[1] - seen, encoded[0], out.past_key_values.get_seq_length(), out.sequences.shape[1]
    print(more or "plain", "new tokens %d, encoded at first %d, cached at the end %d of %d" % found)
    return found


assert second_turn() == (6, 6, 52, 53), "changed"
new, encoded_first, cached, length = second_turn(prompt_lookup_num_tokens=3)
assert encoded_first >= 49 > new and cached > length, "changed"
PYTHON
