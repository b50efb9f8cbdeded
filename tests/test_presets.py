"""The presets have what was published: a second table, written from the sources and not from them.

Besides, each reads its problems, asks them through a chat template, and is in the documentation.
"""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("math_verify")

from evaluation.checkers import CHECKERS
from evaluation.preset import figures_table, settings_table
from evaluation.problems import encode
from evaluation.published import PRESETS
from kvcomp import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "presets.md"
LENGTH = 10_000  # of the full cache's runs
LAYERS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 28,
    "DeepSeek-R1-Distill-Qwen-7B": 28,
    "DeepSeek-R1-Distill-Qwen-14B": 48,
    "DeepSeek-R1-Distill-Llama-8B": 32,
    "Qwen3-8B": 36,
    "delethink-96k-1.5b": 28,
}
QWEN_1_5B, QWEN_7B, QWEN_14B, LLAMA_8B, QWEN3_8B, DELETHINK_96K = LAYERS

# --- as published ---------------------------------------------------------------------------------

GREEDY = {"temperature": 0.0, "top_p": None, "top_k": None, "samples": 1}
OWN = GREEDY | {"temperature": None}
SAMPLED = {"temperature": 0.6, "top_p": 1.0, "top_k": 0, "samples": 256}
SAMPLING = {
    "delta-aime24": GREEDY | {"max_new_tokens": 16384},
    "delta-aime25": GREEDY | {"max_new_tokens": 16384},
    "delta-gpqa": GREEDY | {"max_new_tokens": 16384},
    "delta-math500": GREEDY | {"max_new_tokens": 16384},
    "lazy-eviction-gsm8k": GREEDY | {"max_new_tokens": 4096},
    "lazy-eviction-math500": GREEDY | {"max_new_tokens": 8192},
    "lazy-eviction-aime24": GREEDY | {"max_new_tokens": 16384},
    "louis-kv-math500": OWN | {"max_new_tokens": 32768},
    "louis-kv-gpqa": OWN | {"max_new_tokens": 32768},
    "louis-kv-aime24": OWN | {"max_new_tokens": 32768},
    "delethink-aime24": SAMPLED | {"max_new_tokens": 32768},
    "delethink-aime25": SAMPLED | {"max_new_tokens": 32768},
    "delethink-gpqa": SAMPLED | {"max_new_tokens": 32768},
    "delethink-96k-aime24": SAMPLED | {"max_new_tokens": 98304},
}
PROBLEMS = {"aime24": 30, "aime25": 30, "gpqa": 198, "math500": 500, "gsm8k": 1319}


def delta(layers, k):
    pages = {"budget": k, "page_size": 16, "recent": 8}
    dense = (0, 1, *layers)
    return {
        f"delta {k}": ("delta", pages | {"warmup": 2, "delta_layers": layers}),
        f"quest {k}": ("quest", {"budget": k, "page_size": 16, "sinks": 0, "dense_layers": 2}),
        f"raas {k}": ("raas", {"budget": k, "alpha": 1e-4, "keep_prompt": True, "window": 1}),
        f"random-pages {k}": ("random-pages", pages | {"dense_layers": dense}),
    }


def lazy(label, budget, window, alpha):
    recurrence = {"budget": budget, "window": window, "alpha": alpha}
    every = {"budget": budget, "window": 1}
    return {
        f"lazy-eviction (released) {label}": (
            "lazy-eviction",
            recurrence | {"unit": "query_head", "h1": "code", "keep_prompt": False},
        ),
        f"lazy-eviction {label}": (
            "lazy-eviction",
            recurrence | {"unit": "kv_head", "h1": "paper"},
        ),
        f"tova {label}": ("tova", every | {"unit": "layer"}),
        f"h2o {label}": ("h2o", every | {"num_recent": budget // 2}),
        f"raas {label}": ("raas", every | {"alpha": 1e-4, "keep_prompt": True}),
        f"r-kv {label}": ("r-kv", {"budget": budget, "window": 128, "recent": 8, "trade_off": 0.1}),
    }


LOUIS = {
    "louis-kv 1024": ("louis-kv", {"budget": 1024, "tau": 0.7, "cluster_size": 16}),
    "cluster-kv 1024": ("cluster-kv", {"budget": 1024, "cluster_size": 80, "local": 320}),
    "arkvale 1024": ("arkvale", {"budget": 1024, "page_size": 32}),
    "quest 1024": ("quest", {"budget": 1024, "page_size": 16}),
    "raas 1024": ("raas", {"budget": 1024, "alpha": 1e-4}),
    "h2o 1024": ("h2o", {"budget": 1024}),
}


def delethink(budget, chunks, variant):
    fields = {"chunk": 8192, "carry": 4096, "head": 100, "reset": "prefill", "inner": None}
    fields |= {"max_chunks": chunks, "variant": variant, "budget": budget}
    return {f"delethink {budget}": ("delethink", fields)}


DELTA = {
    QWEN_1_5B: delta((2, 14, 22), 1024) | delta((2, 14, 22), 2048),
    QWEN_7B: delta((2, 14, 22), 1024) | delta((2, 14, 22), 2048),
    QWEN_14B: delta((2, 6, 42), 1024) | delta((2, 6, 42), 2048),
}
CHUNKS = delethink(24576, 5, "paper") | delethink(32768, 7, "paper")
CHUNKED = dict.fromkeys((QWEN_1_5B, QWEN_7B, QWEN_14B), CHUNKS)
METHODS_OF = {
    "delta": DELTA,
    "lazy-eviction-gsm8k": {
        QWEN_7B: lazy("50%", 5000, 101, 1e-4),
        LLAMA_8B: lazy("50%", 5000, 27, 5e-4),
    },
    "lazy-eviction-math500": {
        QWEN_7B: lazy("1492", 1492, 175, 1e-4),
        LLAMA_8B: lazy("1334", 1334, 52, 5e-4),
    },
    "lazy-eviction-aime24": {
        QWEN_7B: lazy("30%", 3000, 363, 1e-4) | lazy("1492", 1492, 363, 1e-4),
        LLAMA_8B: lazy("30%", 3000, 95, 5e-4),
    },
    "louis-kv": {QWEN3_8B: LOUIS},
    "delethink-96k-aime24": {DELETHINK_96K: delethink(98304, 23, "exact_bound")},
    "delethink": CHUNKED,
}
G2 = {  # LongCoT 32K and Delethink: AIME24, AIME25, GPQA-Diamond
    QWEN_1_5B: ((29.3, 23.6, 33.9), (37.2, 29.5, 34.6)),
    QWEN_7B: ((54.4, 40.5, 50.7), (64.1, 47.1, 50.2)),
    QWEN_14B: ((68.9, 52.8, 55.6), (71.8, 52.5, 57.5)),
}
RELEASED = "lazy-eviction (released)"
FIGURES = {
    "lazy-eviction-gsm8k": {
        QWEN_7B: {"full": 89.92, f"{RELEASED} 50%": 88.40},
        LLAMA_8B: {"full": 81.73, f"{RELEASED} 50%": 80.06},
    },
    "lazy-eviction-math500": {
        QWEN_7B: {"full": 86.0, f"{RELEASED} 1492": 85.4},
        LLAMA_8B: {"full": 74.8, f"{RELEASED} 1334": 75.2},
    },
    "lazy-eviction-aime24": {
        QWEN_7B: {f"{RELEASED} 1492": 33.33},
        LLAMA_8B: {"full": 30.0, f"{RELEASED} 30%": 30.0},
    },
    "delethink-96k-aime24": {DELETHINK_96K: {"delethink 98304": 49}},
    **{
        f"delethink-{task}": {
            model: {"full": full[i], "delethink 32768": chunked[i]}
            for model, (full, chunked) in G2.items()
        }
        for i, task in enumerate(("aime24", "aime25", "gpqa"))
    },
}
ROUNDED = {"full": "60", "delta 1024": "50", "delta 2048": "60", "quest 1024": "20"}
ROUNDED |= {"raas 1024": "20"}

every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


def published_methods(preset):
    return METHODS_OF.get(preset.name) or METHODS_OF[preset.name.rpartition("-")[0]]


def short(name):
    return name.rpartition("/")[2]


# --- tests ----------------------------------------------------------------------------------------


def test_every_preset_is_in_the_table_of_this_test():
    assert list(SAMPLING) == list(PRESETS)
    assert all(name == preset.name for name, preset in PRESETS.items())


@every_preset
def test_methods_have_the_published_parameters(preset):
    expected = published_methods(preset)
    assert {short(model) for model in preset.models} == set(expected)
    for model in preset.models:
        methods = preset.methods(model, LENGTH)
        assert next(iter(methods)) == "full" and type(methods.pop("full")) is METHODS["full"]
        assert set(methods) == set(expected[short(model)])
        for label, (name, fields) in expected[short(model)].items():
            method = methods[label]
            assert type(method) is METHODS[name], label
            assert {x: getattr(method, x) for x in fields} == fields, label
            method.check(LAYERS[short(model)])


@every_preset
def test_sampling_and_data_are_the_published_ones(preset):
    assert dataclasses.asdict(preset.sampling) == SAMPLING[preset.name]
    paper, _, task = preset.name.rpartition("-")
    assert preset.data.size == PROBLEMS[task]
    kind = "choice" if task == "gpqa" else "math"
    assert preset.data.checker == (f"{kind}-concluded" if "delethink" in paper else kind)
    assert preset.data.checker in CHECKERS
    assert preset.dtype == ("float16" if "lazy" in paper else "bfloat16")
    assert "arXiv 25" in preset.paper.source and preset.paper.note


@every_preset
def test_figures_are_the_published_ones_and_stand_beside_a_row(preset):
    for model in preset.models:
        assert set(preset.figures(model)) <= set(preset.methods(model, LENGTH))
    found = {
        short(model): dict(preset.figures(model))
        for model in preset.models
        if preset.figures(model)
    }
    if preset.name == "delta-aime24":  # rounded at the source
        assert list(found) == [QWEN_14B]
        assert {x: y.split()[-1] for x, y in found[QWEN_14B].items()} == ROUNDED
    else:
        numbers = {
            model: {label: float(figure) for label, figure in figures.items()}
            for model, figures in found.items()
        }
        assert numbers == FIGURES.get(preset.name, {})


def test_a_share_needs_the_length_of_the_full_runs():
    preset = PRESETS["lazy-eviction-aime24"]
    assert preset.needs_length(QWEN_7B) and not PRESETS["delta-gpqa"].needs_length(QWEN_7B)
    assert "lazy-eviction 30%" not in preset.methods(QWEN_7B)
    assert preset.methods(QWEN_7B)["lazy-eviction 1492"].budget == 1492
    assert preset.methods(QWEN_7B, 12_001.4)["lazy-eviction 30%"].budget == 3600
    with pytest.raises(ValueError, match="budget: expected more than the 363 newest tokens"):
        preset.methods(QWEN_7B, 1_000)


def test_a_model_goes_by_its_last_part_and_another_is_refused():
    preset = PRESETS["delta-aime24"]
    for name in (f"/models/{QWEN_14B}/", QWEN_14B.lower(), f"someone/{QWEN_14B}"):
        assert preset.methods(name)["delta 1024"].delta_layers == (2, 6, 42)
        assert preset.figures(name)
    with pytest.raises(ValueError, match=r"preset delta-aime24: model: expected one of deepseek"):
        preset.methods("Qwen3-8B")


# --- problems and prompts -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """A letter a token, with a chat template that opens the thinking as R1's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*map(chr, range(32, 127)), "\n", "<user>", "<assistant>", "<think>", "<unk>"]
    backend = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, "<unk>"))
    backend.add_special_tokens(["<user>", "<assistant>", "<think>"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    return tokenizer


VALUES = {  # of the fields that public files have
    "id": "one",
    "unique_id": "test/algebra/1.json",
    "problem": "What is $\\frac{6}{2}$?",
    "question": "Three bags hold one ball each. How many balls?",
    "answer": "3",
    "record_id": "rec1",
    "correct_answer": "three",
    "incorrect_answer_1": "one",
    "incorrect_answer_2": "two",
    "incorrect_answer_3": "four",
}


@every_preset
def test_problems_are_read_and_asked(preset, tokenizer, tmp_path):
    line = {name: VALUES[name.lower().replace(" ", "_")] for name in preset.data.fields}
    if preset.data.name.startswith("GSM8K"):
        line["answer"] = "One each.\n1 + 1 + 1 = <<1+1+1=3>>3\n#### 3"
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(line))
    (problem,) = preset.load(file)
    assert problem.checker == preset.data.checker
    (ids,) = encode([problem], tokenizer)
    asked = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "<unk>" not in asked
    assert asked.startswith("<user>") and asked.endswith("within \\boxed{}.<assistant><think>\n")
    assert line.get("problem", line.get("question", line.get("Question"))) in asked
    if problem.choices:
        listed = "\n".join(f"{x}) {text}" for x, text in zip("ABCD", problem.choices, strict=True))
        assert f"\n\n{listed}\n\n" in asked
        assert problem.choices["ABCD".index(problem.answer)] == "three"
    else:
        assert problem.answer == "3"
    right = f"Let me see.</think> It is \\boxed{{{problem.answer}}}."
    check = CHECKERS[problem.checker]
    assert check(problem, right).correct and not check(problem, "</think> \\boxed{}").correct
    assert check(problem, right.replace("</think>", "")).correct == ("delethink" not in preset.name)


# --- documentation --------------------------------------------------------------------------------


def test_the_page_has_the_tables():
    """To write them anew: print(settings_table(PRESETS.values())), and figures_table likewise."""
    page = PAGE.read_text()
    assert settings_table(PRESETS.values()) in page
    assert figures_table(PRESETS.values()) in page


@every_preset
def test_the_page_says_where_settings_are_from_and_what_was_not_found(preset):
    words = " ".join(PAGE.read_text().split())
    for text in (preset.paper.source, preset.paper.note, preset.note):
        assert text in words
    assert all(f"`{name}`" in words for name in preset.data.fields)
