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
PROMPT = 101  # tokens of the prompt of a walk
PAGES = Path(__file__).parents[1] / "docs"
FIRST = "lazy_eviction.md"  # and on from there
SUMMARY = "Summarize the following text in detail, paragraph by paragraph.\n\n"


def options_of_stand(add: Any) -> None:
    """The options of this part, and of `drafted` and `chunks`."""
    add("--only-text", action="store_true", help="stand: without the reasoner")
    add("--text-rows", type=int, default=4, metavar="N", help="stand: rows of it that are sampled")
    add("--methods", nargs="+", choices=methods(), metavar="NAME", help="stand: of the reasoner")
    add("--walks", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="of the reasoner")
    add("--beyond", action="store_true", help="stand: contexts the reasoner was not trained for")
    add("--contexts", type=int, nargs="+", default=[512, 6144], metavar="N", help="tokens before")


class Clock(StoppingCriteria):
    """Ends nothing; knows when the first token was there."""

    began: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **given: Any) -> Tensor:
        if self.began is None:
            self.began = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def methods() -> dict[str, kvcomp.Method]:
    """Under a budget of 256 the reasoner soon errs, behind 3903 tokens after 16; what it writes
    then repeats less. Under 1024 it writes right walks longer."""
    return {
        "full": kvcomp.Full(),
        "delta": kvcomp.Delta(budget=256),
        "delta-1024": kvcomp.Delta(budget=1024),
        "lazy-eviction": kvcomp.LazyEviction(budget=256, window=64),
        "louiskv": kvcomp.LouisKV(budget=512),
        "delethink": kvcomp.Delethink(chunk=256, carry=128, head=32, max_chunks=None),
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


def walk(tokenizer: Any, seed: int, longest: int) -> Tensor:
    """A walk with its prompt, [1, more than longest] ids."""
    steps = max(2048, longest // task.TOKENS_PER_STEP + 1)
    found = task.make_problem(16, steps, seed=seed)
    return tokenizer(found.prompt + " " + found.gold(), return_tensors="pt").input_ids


def stand(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The reasoner greedy, on some walks; with --text, a model that writes prose, greedy and four
    rows sampled: of a summary, and of the answer to one short question."""
    found = []
    longest = model.config.max_position_embeddings - options.new - 1
    contexts = options.contexts if options.beyond else [min(n, longest) for n in options.contexts]
    for context in [] if options.only_text else contexts:
        walks = [walk(tokenizer, seed, context)[:, :context] for seed in options.walks]
        for name in options.methods or methods():
            texts, size = walks, context
            if name == "delethink":  # which encodes nothing but the prompt, and then its carry
                if context != contexts[0]:
                    continue
                texts = [ids[:, :PROMPT] for ids in walks]
                size = PROMPT
            case = {"model": "reasoner", "method": name, "context": size, "rows": 1}
            found.append(measured(model, texts, case, GREEDY, options))
    if options.text:
        path = models.resolve(options.text)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        batch = options.text_rows
        summaries = [summary(tokenizer, context) for context in options.contexts]
        cases = [(ids, *each) for ids in summaries for each in ((1, GREEDY), (batch, SAMPLED))]
        for ids, rows, sampling in [*cases, (question(tokenizer), batch, ASKED)]:
            size = {"context": ids.shape[1], "rows": rows}
            case = {"model": options.text, "method": "full", **size}
            found.append(measured(model, [ids], case, sampling, options))
    return found


class Contender:
    """What the runs of one loop have taken: seconds from the first token on, tokens decoded and
    accepted."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.seconds: list[float] = []
        self.decoded = self.accepted = 0
        self.tokens: list[Tensor] = []

    def run(self, run: Any, ids: Tensor, filled: Any, noise: int, **given: Any) -> None:
        before, clock = run.report(), Clock()
        own = {} if self.loop is None else {"custom_generate": self.loop()}
        cache = {} if filled is None else {"past_key_values": deepcopy(filled)}
        out = run.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=run.model.config.vocab_size if filled is None else None,  # none at all
            pad_token_id=0,
            stopping_criteria=[clock],
            logits_processor=[thinking.GumbelNoise(noise)],
            **given,
            **cache,
            **own,
        )
        assert clock.began is not None
        self.seconds.append(time.perf_counter() - clock.began)
        self.tokens.append(out[:, ids.shape[1] :])
        after = run.report()
        self.decoded += after.tokens_decoded - before.tokens_decoded
        self.accepted += after.tokens_accepted - before.tokens_accepted


def measured(
    model: Any, texts: list[Tensor], case: dict, sampling: dict, options: argparse.Namespace
) -> dict[str, Any]:
    """Contenders in turn over copies of one cache for each text. Under Delethink, whose chunks
    begin behind a prompt, a text is no longer than one."""
    every = {
        "plain": Contender(None),
        "stand": Contender(partial(thinking.Stand, together=False)),
        "alone": Contender(without_drafts),
    }
    given = {"max_new_tokens": options.new, **sampling}
    for prompt in texts:
        ids = prompt.repeat(case["rows"], 1)
        with kvcomp.patch(model, methods()[case["method"]]) as run, torch.no_grad():
            filled = None
            if case["method"] != "delethink":
                filled = run.new_cache()
                run.decoder(prompt[:, :-1], past_key_values=filled)
                filled.batch_repeat_interleave(case["rows"])
            for turn in range(options.rounds):
                for contender in every.values():
                    contender.run(run, ids, filled, turn, **given)
    return row_of(case, sampling, every, options)


def row_of(
    case: dict, sampling: dict, every: dict[str, Contender], options: argparse.Namespace
) -> dict[str, Any]:
    plain, own = every["plain"], every["stand"]
    tokens = case["rows"] * (options.new - 1)
    rate = {name: tokens / statistics.median(each.seconds) for name, each in every.items()}
    texts = list(zip(plain.tokens, own.tokens, strict=True))
    same = [float((one == other).float().cumprod(1).mean()) for one, other in texts]
    pairs = [one / other for one, other in zip(plain.seconds, own.seconds, strict=True)]
    walks = [pairs[i : i + options.rounds] for i in range(0, len(pairs), options.rounds)]
    return {
        "part": "stand",
        "contender": f"{case['model']} {case['method']} {case['context']} x{case['rows']}",
        **case,
        "sampled": sampling["do_sample"],
        "temperature": sampling["temperature"],
        "plain_tokens_per_second": rate["plain"],
        "stand_tokens_per_second": rate["stand"],
        "ratio": statistics.median(pairs),
        "ratios": [statistics.median(each) for each in walks],
        "ratio_min": min(plain.seconds) / min(own.seconds),
        "ratio_without_drafts": rate["alone"] / rate["plain"],
        "tokens_per_forward": own.decoded / max(own.decoded - own.accepted, 1),
        "same_tokens": statistics.mean(same),
    }
