#!/usr/bin/env bash
# CTranslate2 4.8.5 converts models of transformers 5.23.0 and leaves out, with no warning, parts of the
# config that change the results:
#   * Llama 3.1's scaling of the rotary frequencies. The converter accepts `rope_type` "llama3", stores its
#     factors, and refuses "yarn"; the logits are those of a model without any scaling.
#   * Gemma 2's soft caps, on attention logits and on the last logits: greedy tokens may be the same, and
#     probabilities are not.
#   * Gemma 2's `query_pre_attn_scalar` (144 in the 27B model, whose heads have 128): queries are scaled
#     by the head size.
#
# Seen: logits of Llama 3.1 up to 0.5 apart within 100 tokens, of Gemma 2 up to 0.07, 1.6 and 0.2; 0.00001
# against the same model with these parts taken out of its config.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
VOCABULARY = 64
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0"
)
ids = torch.arange(100) * 7 % 60 + 3
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(family: str, options: dict) -> torch.nn.Module:
    config, kind = (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Gemma2Config, Gemma2ForCausalLM)
    model = kind(config(**SHAPE, **options)).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(ids[None]).logits[0].numpy()


def converted(model: torch.nn.Module) -> np.ndarray:
    model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    TransformersConverter("saved").convert("converted", force=True)
    generator = ctranslate2.Generator("converted", device="cpu", intra_threads=1)
    return np.array(generator.forward_batch([[f"t{i}" for i in ids.tolist()]]))[0]


llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
llama3["original_max_position_embeddings"] = 8192
default = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
plain = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 32}
for name, family, options, without in (
    ("Llama 3.1's rotary scaling", "llama", {"rope_parameters": llama3}, default),
    ("Gemma 2's cap on attention", "gemma2", plain | {"attn_logit_softcapping": 50.0}, plain),
    ("Gemma 2's cap on last logits", "gemma2", plain | {"final_logit_softcapping": 30.0}, plain),
    ("Gemma 2's query scaling", "gemma2", plain | {"query_pre_attn_scalar": 36}, plain),
):
    model = made(family, options)
    found = converted(model)
    apart, same = (np.abs(found - logits(m)).max() for m in (model, made(family, without)))
    print(f"{name:28} {apart:.6f} from transformers, {same:.6f} from transformers without it")
    assert apart > 0.02 and same < 1e-4, f"changed: {name}"
PYTHON
