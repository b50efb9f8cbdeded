"""The bundled reasoner: walks decoded freely, or read token by token, and graded."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import kvcomp
from kvcomp import Method
from kvcomp.reasoner import path, task


class Reasoner:
    """The model, and what it makes of problems under a method."""

    def __init__(self, device: str) -> None:
        logging.disable_progress_bar()
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path())
        self.model = AutoModelForCausalLM.from_pretrained(path()).float().to(device).eval()

    def token_bytes(self) -> int:
        """Of K and V of one token, all layers."""
        config = self.model.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4

    def free(self, problems: list[task.Problem], method: Method) -> tuple[list[task.Grade], Any]:
        """Greedy decoding, graded step by step."""
        inputs = self._tokens([problem.prompt for problem in problems])
        with kvcomp.patch(self.model, method) as run:
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=problems[0].steps * task.TOKENS_PER_STEP,
            )
        answers = out[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        grades = [task.grade(p, text) for p, text in zip(problems, texts, strict=True)]
        return grades, run.report()

    @torch.no_grad()
    def forced(self, problems: list[task.Problem], method: Method) -> tuple[list[task.Grade], Any]:
        """The right answers, token by token; a step is right if each of its tokens is foreseen."""
        inputs = self._tokens([problem.prompt for problem in problems])
        assert bool(inputs["attention_mask"].all()), "prompts of one length"
        gold = self._tokens([problem.gold() for problem in problems], special=False)["input_ids"]
        with kvcomp.patch(self.model, method) as run:
            cache = run.new_cache()
            foreseen = []
            fed = inputs["input_ids"]
            for column in range(gold.shape[1]):
                logits = self.model(fed, past_key_values=cache).logits[:, -1]
                foreseen.append(logits.argmax(-1))
                fed = gold[:, column : column + 1]
        right = (torch.stack(foreseen, 1) == gold).unflatten(1, (-1, task.TOKENS_PER_STEP)).all(-1)
        return [
            _graded(p, row) for p, row in zip(problems, right.tolist(), strict=True)
        ], run.report()

    def _tokens(self, texts: list[str], special: bool = True) -> Any:
        return self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=special
        ).to(self.device)


def _graded(problem: task.Problem, right: list[bool]) -> task.Grade:
    used: set[str] = set()
    firsts = []
    for (source, *_), ok in zip(problem.walk(), right, strict=True):
        if source not in used:
            firsts.append(ok)
        used.add(source)
    return task.Grade(mean(right), all(right), len(right), mean(firsts))
