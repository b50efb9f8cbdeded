"""Part `stand` of bench_thinking.py: tokens per second of a method with Stand and without."""

from __future__ import annotations

import argparse
import statistics
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

import kvcomp
from kvcomp import models, thinking
from kvcomp.reasoner import task

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
ASKED = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
QUESTION = (
    "A farmer has 17 sheep and buys 5 more each week. How many are there after 6 weeks? Explain."
)
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
PAGES = Path(__file__).parents[1] / "docs"
FIRST = "lazy_eviction.md"  # and on from there
SUMMARY = "Summarize the following text in detail, paragraph by paragraph.\n\n"


class Clock(StoppingCriteria):
    """Ends nothing; knows when the first token was there."""

    began: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **given: Any) -> Tensor:
        if self.began is None:
            self.began = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def methods() -> dict[str, kvcomp.Method]:
    return {
        "full": kvcomp.Full(),
        "delta": kvcomp.Delta(budget=256),
        "lazy-eviction": kvcomp.LazyEviction(budget=256, window=64),
    }


def summary(tokenizer: Any, context: int) -> Tensor:
    """A question in the chat template that asks for a summary of a text: [1, about context] ids."""

    def asked(text: str) -> Tensor:
        turn = [{"role": "user", "content": SUMMARY + text}]
        given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return tokenizer.apply_chat_template(turn, **given)["input_ids"]

    pages = sorted(PAGES.glob("*.md"), key=lambda page: (page.name < FIRST, page.name))
    words = tokenizer("\n".join(page.read_text() for page in pages)).input_ids
    return asked(tokenizer.decode(words[: context - asked("").shape[1]]))


def question(tokenizer: Any) -> Tensor:
    """A short question in the chat template: [1, n] ids."""
    turn = [{"role": "user", "content": QUESTION}]
    given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(turn, **given)["input_ids"]


def without_drafts() -> thinking.Stand:
    """The loop of Stand over a table that knows nothing: what is won otherwise than by drafts."""
    alone = thinking.Stand(together=False)
    alone.table.find = lambda ids: None  # type: ignore[method-assign]
    return alone


def stand(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The reasoner greedy; with --text, a model that writes prose, greedy and four rows sampled:
    of a summary, and of the answer to one short question."""
    walk = task.make_problem(16, 2048, seed=1)
    words = tokenizer(walk.prompt + " " + walk.gold(), return_tensors="pt").input_ids
    found = []
    longest = model.config.max_position_embeddings - options.new - 1
    for context in [] if options.only_text else [min(n, longest) for n in options.contexts]:
        for name in methods():
            case = {"model": "reasoner", "method": name, "context": context, "rows": 1}
            found.append(measured(model, words[:, :context], case, GREEDY, options))
    if options.text:
        path = models.resolve(options.text)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        summaries = [summary(tokenizer, context) for context in options.contexts]
        cases = [(ids, *each) for ids in summaries for each in ((1, GREEDY), (4, SAMPLED))]
        for ids, rows, sampling in [*cases, (question(tokenizer), 4, ASKED)]:
            size = {"context": ids.shape[1], "rows": rows}
            case = {"model": options.text, "method": "full", **size}
            found.append(measured(model, ids, case, sampling, options))
    return found


def measured(
    model: Any, ids: Tensor, case: dict, sampling: dict, options: argparse.Namespace
) -> dict[str, Any]:
    """Contenders in turn over copies of one cache; seconds from the first token on."""
    prompt, ids = ids, ids.repeat(case["rows"], 1)
    loops = {
        "plain": None,
        "stand": partial(thinking.Stand, together=False),
        "alone": without_drafts,
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    spent: dict[str, tuple[int, int]] = {}
    tokens: dict[str, Tensor] = {}
    with kvcomp.patch(model, methods()[case["method"]]) as run, torch.no_grad():
        filled = run.new_cache()
        run.decoder(prompt[:, :-1], past_key_values=filled)
        filled.batch_repeat_interleave(case["rows"])
        for turn in range(options.rounds):
            for name, loop in loops.items():
                before, clock = run.report(), Clock()
                noise = thinking.GumbelNoise(turn)
                own = {} if loop is None else {"custom_generate": loop()}
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=deepcopy(filled),
                    max_new_tokens=options.new,
                    eos_token_id=None,
                    stopping_criteria=[clock],
                    logits_processor=[noise],
                    **sampling,
                    **own,
                )
                assert clock.began is not None
                seconds[name].append(time.perf_counter() - clock.began)
                tokens[name] = out[:, ids.shape[1] :]
                after = run.report()
                decoded, accepted = spent.get(name, (0, 0))
                spent[name] = (
                    decoded + after.tokens_decoded - before.tokens_decoded,
                    accepted + after.tokens_accepted - before.tokens_accepted,
                )
    decoded, accepted = spent["stand"]
    rate = {n: case["rows"] * (options.new - 1) / statistics.median(s) for n, s in seconds.items()}
    same = (tokens["plain"] == tokens["stand"]).float().cumprod(1).mean()
    pairs = list(zip(seconds["plain"], seconds["stand"], strict=True))
    return {
        "part": "stand",
        "contender": f"{case['model']} {case['method']} {case['context']} x{case['rows']}",
        **case,
        "sampled": sampling["do_sample"],
        "temperature": sampling["temperature"],
        "plain_tokens_per_second": rate["plain"],
        "stand_tokens_per_second": rate["stand"],
        "ratio": rate["stand"] / rate["plain"],
        "ratios": [plain / own for plain, own in pairs],
        "ratio_min": min(seconds["plain"]) / min(seconds["stand"]),
        "ratio_without_drafts": rate["alone"] / rate["plain"],
        "tokens_per_forward": decoded / max(decoded - accepted, 1),
        "same_tokens": float(same),
    }
