#!/usr/bin/env bash
# transformers 5.23.0: generate(streamer=..., custom_generate=FUNCTION) gives the streamer the prompt and
# nothing else. `_extract_generation_mode_kwargs` replaces the arguments of the mode (streamer, tokenizer,
# synced_gpus) by those that only the function has, so the function is called without the streamer, even
# if it has a parameter of that name. Tokens are not put, and end() is not called. No warning says so.
# kvcomp: thinking.Stand(streamer=...) takes the streamer itself.
#
# Seen: greedy decoding of four tokens puts 1 + 4 times and ends; the same loop, handed in as a function,
# returns the same tokens, puts once (the prompt) and does not end.
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


class Streamer:
    def __init__(self):
        self.puts, self.ended = 0, False

    def put(self, value):
        self.puts += 1

    def end(self):
        self.ended = True


def own(model, input_ids, streamer=None, **given):
    """The stock loop, with the streamer that it is given."""
    told.append(streamer)
    return type(model)._sample(model, input_ids, streamer=streamer, **given)


def decode(**more):
    streamer = Streamer()
    out = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None,
        streamer=streamer, **more,
    )
    print("custom_generate" if more else "stock", out.tolist(), f"puts {streamer.puts}, ended {streamer.ended}")
    return out, streamer


told = []
stock, first = decode()
custom, second = decode(custom_generate=own)
assert torch.equal(stock, custom)
assert (first.puts, first.ended) == (5, True), "changed"
assert (second.puts, second.ended) == (1, False) and told == [None], "changed"
PYTHON
