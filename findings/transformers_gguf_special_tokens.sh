#!/usr/bin/env bash
# transformers 5.23.0 reads the special tokens of a GGUF file (control and user-defined, by
# `tokenizer.ggml.token_type`) only if they are written in GPT-2's byte alphabet. DeepSeek's are not:
# <｜User｜> has full-width bars. Of such a file
#   * <｜User｜> and <｜Assistant｜>, between which the chat template writes each turn, are cut into bytes;
#   * <｜begin▁of▁sentence｜> and <｜end▁of▁sentence｜> get new ids behind the vocabulary, for which the model
#     has no row: the chat template's prompt, which begins with it, ends in an IndexError of the
#     embedding, and the id that the model ends with is not the tokenizer's end.
# No warning says so. <|im_start|>, the same kind of token in ASCII, is read as it should be, and so is <think>.
# The files of DeepSeek-R1 distilled into Qwen and Llama are such files.
# kvcomp: kvcomp/models/gguf_tokens.py gives these tokens their ids back.
#
# Seen: <|im_start|> and <think> are one token each; <｜User｜> is 12, and the ids of begin and end are 266
# and 267 in a vocabulary of 265.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import gguf
import numpy as np
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

print("transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BEGIN, END, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<｜User｜>{{ message.content }}{% endfor %}<｜Assistant｜><think>\n"
)
kinds = dict.fromkeys(bytes_to_unicode().values(), NORMAL) | {"ab": NORMAL}
kinds |= dict.fromkeys((BEGIN, END, USER, ASSISTANT, "<|im_start|>", "<|im_end|>"), CONTROL)
kinds |= dict.fromkeys(("<think>", "</think>"), USER_DEFINED)
tokens = list(kinds)
WIDTH, HEADS = 32, 2
writer = gguf.GGUFWriter("model.gguf", "qwen2")
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_block_count(1)
writer.add_feed_forward_length(WIDTH)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(1e4)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("deepseek-r1-qwen")
writer.add_token_list(tokens)
writer.add_token_types(list(kinds.values()))
writer.add_token_merges(["a b"])
writer.add_bos_token_id(tokens.index(BEGIN))
writer.add_eos_token_id(tokens.index(END))
writer.add_chat_template(TEMPLATE)
random = np.random.default_rng(0)
shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
for name in ("attn_norm", "ffn_norm"):
    shapes[f"blk.0.{name}"] = (WIDTH,)
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
for name in ("attn_q", "attn_k", "attn_v"):
    writer.add_tensor(f"blk.0.{name}.bias", np.zeros(WIDTH, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype="float32")
rows = model.get_input_embeddings().weight.shape[0]
print(f"{len(tokens)} tokens in the file, {rows} rows in the model, {len(tokenizer)} tokens in the tokenizer")
for token in ("ab", "<|im_start|>", "<think>", USER, ASSISTANT, BEGIN, END):
    ids = tokenizer(token, add_special_tokens=False).input_ids
    print(f"{token}: {tokens.index(token)} in the file, read as {ids}")
    if token in (USER, ASSISTANT):
        assert len(ids) == len(token.encode()), f"changed: {token}"
    elif token in (BEGIN, END):
        assert len(ids) == 1 and ids[0] >= rows, f"changed: {token}"
    else:
        assert ids == [tokens.index(token)], f"changed: {token}"
print("end: the model's", model.config.eos_token_id, "and the tokenizer's", tokenizer.eos_token_id)
assert model.config.eos_token_id == tokens.index(END) != tokenizer.eos_token_id, "changed: the end"
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_tensors="pt", return_dict=True)
try:
    model.generate(**prompt, max_new_tokens=1, do_sample=False)
except IndexError as error:
    print("generate from the chat template:", error)
else:
    raise SystemExit("changed: generate from the chat template")
PYTHON
