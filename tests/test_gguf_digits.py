"""Numbers in a text are split as the vocabulary of a GGUF file was made."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import gguf
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvcomp.models import convert

SPACE = bytes_to_unicode()[ord(" ")]


@pytest.fixture
def write(tmp_path):
    """A vocabulary of single characters, two spaces and the number 12."""

    def file(pre):
        path = tmp_path / f"{pre}.gguf"
        tokens = [*bytes_to_unicode().values(), SPACE * 2, "12"]
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges([f"{SPACE} {SPACE}", "1 2"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return file


@pytest.mark.parametrize("pre", ["smollm", "refact", "command-r"])
def test_digits_come_first_where_the_file_says_so(write, pre):
    tokenizer = convert.tokenizer(write(pre))
    assert tokenizer.tokenize("x  12") == ["x", SPACE * 2, "1", "2"]
    assert tokenizer.decode(tokenizer("x  12").input_ids) == "x  12"


@pytest.mark.parametrize("pre", ["", "gpt-2"])
def test_others_split_as_before(write, pre):
    tokens = convert.tokenizer(write(pre)).tokenize("x  12")
    assert tokens == ["x", SPACE, SPACE, "12"]
