#!/usr/bin/env bash
# transformers 5.23.0 reads a GGUF file without the scaling of its rotary positions. Of a Llama or Qwen2
# file it takes `rope.freq_base` and passes over `rope.scaling.*` (YaRN, linear) and the tensor
# `rope_freqs.weight`, in which llama.cpp's converter puts the scaled frequencies of Llama 3.1 and later.
# `rope_type` is "default" and there is no warning, while the longer context length is taken over. So a
# model whose context was stretched runs with the frequencies of before: short texts look sound, and
# a long chain of thought does not.
#
# Seen: the logits of a file with YaRN, with linear scaling and with rope_freqs.weight are those of the
# file without any scaling, bit for bit.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
mkdir model
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

HEADS, KV_HEADS, DIM, VOCABULARY, INNER, FACTOR = 4, 2, 32, 64, 128, 4.0
print("transformers", version("transformers"), "gguf", version("gguf"), "torch", torch.__version__)


def write(architecture: str, scaling: str) -> None:
    file = gguf.GGUFWriter("model/tiny.gguf", architecture)
    hidden = HEADS * DIM
    file.add_context_length(4096)
    file.add_block_count(1)
    file.add_embedding_length(hidden)
    file.add_feed_forward_length(INNER)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    file.add_key_length(DIM)
    file.add_value_length(DIM)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(DIM)
    file.add_vocab_size(VOCABULARY)
    file.add_tokenizer_model("gpt2")
    file.add_token_list([str(token) for token in range(VOCABULARY)])
    if scaling in ("yarn", "linear"):
        file.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        file.add_rope_scaling_factor(FACTOR)
        file.add_rope_scaling_orig_ctx_len(1024)
    if scaling == "rope_freqs.weight":
        file.add_tensor("rope_freqs.weight", np.linspace(1, 8, DIM // 2, dtype=np.float32))
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCABULARY, hidden),
        "output.weight": (VOCABULARY, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (KV_HEADS * DIM, hidden),
        "blk.0.attn_v.weight": (KV_HEADS * DIM, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.ffn_gate.weight": (INNER, hidden),
        "blk.0.ffn_up.weight": (INNER, hidden),
        "blk.0.ffn_down.weight": (hidden, INNER),
    }
    if architecture == "qwen2":
        shapes |= {f"blk.0.attn_{p}.bias": (HEADS * DIM if p == "q" else KV_HEADS * DIM,) for p in "qkv"}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        file.add_tensor(name, 1 + 0 * values if "norm" in name else 0.1 * values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def read() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained("model", gguf_file="tiny.gguf", dtype=torch.float32)


tokens = torch.arange(60)[None]
for architecture in ("llama", "qwen2"):
    write(architecture, "none")
    model = read()
    plain = model(tokens).logits
    # The scaling does matter to these logits: linear scaling, put in by hand.
    model.model.rotary_emb.inv_freq /= FACTOR
    assert (model(tokens).logits - plain).abs().max() > 0.1, "positions hardly matter here"
    for scaling in ("yarn", "linear", "rope_freqs.weight"):
        write(architecture, scaling)
        model = read()
        kind, context = model.config.rope_parameters["rope_type"], model.config.max_position_embeddings
        same = torch.equal(model(tokens).logits, plain)
        print(f"{architecture} {scaling:18} rope_type {kind!r}, context {context}, logits without scaling: {same}")
        assert same and kind == "default" and context == 4096, "changed: the scaling is read now"
PYTHON
