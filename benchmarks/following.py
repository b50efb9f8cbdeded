"""Part `follow` of bench_thinking.py: a leader, a drafter, and what changing between them costs.

Both are the same model here, the drafter's cache evicts. So the figures are those of the strategy,
not of two models: the share of tokens that the leader writes, hand-overs per sentence, and the time
of the forward in which one reads what the other wrote, against a step of one token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from prose import QUESTIONS, asked, load
from transformers import AutoModelForCausalLM

import kvcomp
from kvcomp import reasoner, thinking
from kvcomp.reasoner import task

LEADS = (0, 2, 5, 15, 10**6)


def follow(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Greedy; a sentence of the reasoner's ends with each "9"."""
    name, ends = "reasoner", ("9",)
    if options.text:
        name, ends = options.text, thinking.follow.ENDS
        model, tokenizer = load(options.text)
        prompt, (other, _) = asked(tokenizer, QUESTIONS[0]), load(options.text)
    else:
        problem = task.make_problem(8, options.steps, seed=0)
        prompt = tokenizer(problem.prompt, return_tensors="pt")
        other = AutoModelForCausalLM.from_pretrained(reasoner.path()).eval()
    new = min(options.new, options.steps * task.TOKENS_PER_STEP)
    evicting = kvcomp.LazyEviction(budget=96, window=32)
    rows = []
    with kvcomp.patch(model, kvcomp.Full()) as leader, kvcomp.patch(other, evicting) as drafter:
        for lead in LEADS:
            began = time.perf_counter()
            found = thinking.follow_leader(
                *(leader, drafter, tokenizer, prompt),
                **{"lead": lead, "ends": ends, "temperature": 0, "max_new_tokens": new},
            )
            seconds = time.perf_counter() - began
            texts = [tokenizer.decode(found.ids[: n + 1]) for n in range(len(found.ids))]
            sentences = max(sum(text.endswith(ends) for text in texts), 1)
            rows.append(
                {
                    "part": "follow",
                    "contender": f"{name} lead {lead if lead < new else 'all'}",
                    "tokens": len(found.ids),
                    "led": found.led / len(found.ids),
                    "handovers_per_sentence": found.handovers / sentences,
                    "tokens_per_second": len(found.ids) / seconds,
                }
            )
        rows.append(read_cost(name, leader, prompt["input_ids"], options.rounds))
    return rows


@torch.no_grad()
def read_cost(name: str, run: Any, ids: Any, rounds: int) -> dict[str, Any]:
    """The time of a forward over 15 new tokens to the one over 1, on one cache, in turn."""
    cache = run.new_cache()
    run.model(ids, past_key_values=cache)
    seconds: dict[int, list[float]] = {1: [], 15: []}
    for _ in range(4 * rounds):
        for count, found in seconds.items():
            began = time.perf_counter()
            run.model(ids[:, -1:].repeat(1, count), past_key_values=cache)
            found.append(time.perf_counter() - began)
    ratio = statistics.median(seconds[15]) / statistics.median(seconds[1])
    return {"part": "follow", "contender": f"{name} reading 15 tokens", "time_to_step": ratio}
