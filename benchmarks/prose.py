"""Parts of bench_thinking.py on a model that writes prose, with --text: answers to questions.

The questions are asked in the chat template of the model. A small model does not think, so its
whole answer stands for the thought, and the token that ends a turn for the end of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcomp
from kvcomp import models, thinking

QUESTIONS = (
    "Why is the sky blue, and why is it red in the evening?",
    "How do I make bread at home? Explain every step.",
    "A farmer has 17 sheep and buys 5 more each week. How many are there after 6 weeks? Explain.",
    "What are the causes of the tides? Give reasons.",
    "Compare trains and planes for a journey of 500 kilometres.",
)
SHORT = " Keep the answer as short as the question allows."
WARM = {"temperature": 0.7, "top_p": 0.95}
BIASES = (-8, -4, 0, 4, 8)
Row = dict[str, Any]


def load(name: str) -> tuple[Any, Any]:
    path = models.resolve(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(path)


def asked(tokenizer: Any, question: str) -> Any:
    turn = [{"role": "user", "content": question}]
    given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(turn, **given)


def row(part: str, name: str, options: argparse.Namespace, **found: Any) -> Row:
    return {"part": part, "contender": f"{options.text} {name}", **found}


def cgrs(options: argparse.Namespace) -> list[Row]:
    """Tentative answers behind paragraphs: their tokens and time, per token of the answer."""
    model, tokenizer = load(options.text)
    settings: dict[str, Any] = {"plain": None, "probing": {}, "lazy": {"lazy": True}}
    settings["fixed rate"] = {"rate": 0.25}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    found: dict[str, Row] = {}
    prompts = [asked(tokenizer, question) for question in QUESTIONS[:2]]
    with kvcomp.patch(model, kvcomp.Full()) as run:
        for _ in range(options.rounds):
            for name, more in settings.items():
                spent, tokens, made = 0.0, 0, []
                for prompt in prompts:
                    own = [] if more is None else [thinking.Cgrs(run, tokenizer, **more)]
                    sampling = thinking.Sampling(temperature=0, max_new_tokens=options.new)
                    rows = thinking.Rows(run, prompt, sampling, processors=own)
                    began = time.perf_counter()
                    rows.finish()
                    spent += time.perf_counter() - began
                    tokens += rows.tokens
                    made += own
                seconds[name].append(spent / tokens)
                sure = [each for one in made for each in one.certainties]
                found[name] = {
                    "tokens": tokens,
                    "probes": sum(each.probes for each in made),
                    "trial_tokens_per_token": sum(each.trial_tokens for each in made) / tokens,
                    "suppressed": sum(each.suppressed for each in made),
                    **({"certainty_least": min(sure), "certainty_most": max(sure)} if sure else {}),
                }
    plain = statistics.median(seconds["plain"])
    return [
        row("cgrs", name, options, time_to_plain=statistics.median(each) / plain, **found[name])
        for name, each in seconds.items()
    ]


def hint(options: argparse.Namespace) -> list[Row]:
    """Tokens of an answer with hints and without, and with a sentence in the question instead."""
    model, tokenizer = load(options.text)
    given = {"alpha": min(48, options.new // 2)}
    fixed = {"max_new_tokens": options.new, "do_sample": False}
    fixed |= {"temperature": None, "top_p": None, "top_k": None}
    cases = [(place, ending) for ending in ("", SHORT) for place in ("plain", "end", "rewind")]
    rows = []
    with kvcomp.patch(model, kvcomp.Full()):
        for place, ending in cases:
            lengths, hints, ended = [], 0, 0
            for question in QUESTIONS:
                prompt = asked(tokenizer, question + ending)
                size = prompt["input_ids"].shape[1]
                more: dict[str, Any] = {}
                if place != "plain":
                    made = thinking.ConciseHint(tokenizer, size, place=place, **given)
                    loop = place == "rewind"
                    more = {"custom_generate": made} if loop else {"logits_processor": [made]}
                out = model.generate(**prompt, **fixed, **more)[0, size:]
                lengths.append(len(out))
                hints += tokenizer.decode(out).count(thinking.concise_hint.HINT.strip())
                ended += int(out[-1]) in thinking.rows.eos_of(model)
            name = place + (", asked to be short" if ending else "")
            per = {"hints": hints / len(QUESTIONS), "ended": ended, "of": len(QUESTIONS)}
            rows.append(row("hint", name, options, tokens=statistics.mean(lengths), **per))
    return rows


def stop(options: argparse.Namespace) -> list[Row]:
    """Tokens of sampled answers by the bias of their end, and of those within a budget."""
    model, tokenizer = load(options.text)
    prompt = asked(tokenizer, QUESTIONS[0])
    columns, end = prompt["input_ids"].shape[1], tokenizer.eos_token
    scale = partial(thinking.StopScale, tokenizer, columns, end=end)
    cases: dict[str, list[Any]] = {f"bias {b}": [scale(bias=float(b))] for b in BIASES}
    low, high = options.new // 4, options.new // 2
    forcing = partial(thinking.BudgetForcing, tokenizer, columns, end=end)
    cases[f"budget {low}..{high}"] = [scale(bias=8.0), forcing(minimum=low, budget=high)]
    found = []
    with kvcomp.patch(model, kvcomp.Full()) as run:
        for name, chosen in cases.items():
            sampling = thinking.Sampling(**WARM, max_new_tokens=options.new)
            rows = thinking.Rows(run, prompt, sampling, copies=options.rows, processors=chosen)
            rows.finish()
            lengths = [len(each.ids) - each.ended for each in rows.all]
            ends = {"shortest": min(lengths), "longest": max(lengths)}
            found.append(row("stop", name, options, mean=statistics.mean(lengths), **ends))
    return found


PROSE = {"cgrs": cgrs, "hint": hint, "stop": stop}
