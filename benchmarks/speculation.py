"""Part `stand` of bench_thinking.py: tokens per second of a method with Stand and without."""

from __future__ import annotations

import argparse
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

import kvcomp
from kvcomp import models, thinking
from kvcomp.reasoner import task

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
PAGES = Path(__file__).parents[1] / "docs"


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


def stand(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The reasoner greedy; with --text, a model that writes prose, greedy and four rows sampled."""
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
        pages = "\n".join(page.read_text() for page in sorted(PAGES.glob("*.md")))
        words = tokenizer(pages, return_tensors="pt").input_ids
        for context in options.contexts:
            for rows, sampling in ((1, GREEDY), (4, SAMPLED)):
                case = {"model": options.text, "method": "full", "context": context, "rows": rows}
                found.append(measured(model, words[:, :context], case, sampling, options))
    return found


def measured(
    model: Any, ids: Tensor, case: dict, sampling: dict, options: argparse.Namespace
) -> dict[str, Any]:
    """Contenders in turn over copies of one cache; seconds from the first token on."""
    prompt, ids = ids, ids.repeat(case["rows"], 1)
    seconds: dict[str, list[float]] = {"plain": [], "stand": []}
    tokens: dict[str, Tensor] = {}
    with kvcomp.patch(model, methods()[case["method"]]) as run, torch.no_grad():
        filled = run.new_cache()
        run.decoder(prompt[:, :-1], past_key_values=filled)
        filled.batch_repeat_interleave(case["rows"])
        for turn in range(options.rounds):
            for name in ("plain", "stand"):
                before, clock = run.report(), Clock()
                noise = thinking.GumbelNoise(turn)
                own = {"custom_generate": thinking.Stand()} if name == "stand" else {}
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
    forwards = after.tokens_decoded - before.tokens_decoded
    accepted = after.tokens_accepted - before.tokens_accepted
    rate = {n: case["rows"] * (options.new - 1) / statistics.median(s) for n, s in seconds.items()}
    same = (tokens["plain"] == tokens["stand"]).float().cumprod(1).mean()
    return {
        "part": "stand",
        "contender": f"{case['model']} {case['method']} {case['context']} x{case['rows']}",
        **case,
        "sampled": sampling is SAMPLED,
        "plain_tokens_per_second": rate["plain"],
        "stand_tokens_per_second": rate["stand"],
        "ratio": rate["stand"] / rate["plain"],
        "ratio_min": min(seconds["plain"]) / min(seconds["stand"]),
        "tokens_per_forward": forwards / max(forwards - accepted, 1),
        "same_tokens": float(same),
    }
