"""Special tokens of a GGUF file keep their ids, whatever letters they are written in."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import gguf
import numpy as np
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvcomp.models import convert, gguf_tokens

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BEGIN, END, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"
CALLS = "<｜tool▁calls▁begin｜>"
KINDS = dict.fromkeys(bytes_to_unicode().values(), NORMAL) | {"ab": NORMAL}
KINDS |= dict.fromkeys((BEGIN, END, USER, "<|im_start|>"), CONTROL)
KINDS |= dict.fromkeys(("<think>", CALLS), USER_DEFINED)
TOKENS = list(KINDS)
WIDTH = 32


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A model of one layer with special tokens like those of DeepSeek-R1."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(TOKENS)
    writer.add_token_types(list(KINDS.values()))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(TOKENS.index(BEGIN))
    writer.add_eos_token_id(TOKENS.index(END))
    writer.add_add_bos_token(True)
    rows = (len(TOKENS), WIDTH)
    shapes = {"token_embd": rows, "output": rows, "output_norm": (WIDTH,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}"] = (WIDTH,)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(tokenizer):
    text = f"{USER}ab<|im_start|><think>ab{CALLS}{END}"
    parts = [BEGIN, USER, "ab", "<|im_start|>", "<think>", "ab", CALLS, END]
    ids = tokenizer(text).input_ids
    assert ids == [TOKENS.index(part) for part in parts]
    assert tokenizer.decode(ids) == BEGIN + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"ab<think>ab{CALLS}"
    assert tokenizer.bos_token_id == TOKENS.index(BEGIN)
    assert tokenizer.eos_token_id == TOKENS.index(END)
    assert len(tokenizer) == len(TOKENS)


def test_special_tokens_keep_their_ids(file):
    tokenizer = convert.tokenizer(file)
    check(tokenizer)
    gguf_tokens.restore(tokenizer, gguf.GGUFReader(file).fields)  # nothing is left to do
    check(tokenizer)


def test_a_converted_folder_keeps_them(file, tmp_path):
    convert.convert(file, tmp_path)
    check(AutoTokenizer.from_pretrained(tmp_path))
