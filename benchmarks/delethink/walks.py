"""The bundled reasoner, its walks, and which tokens of an answer are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from delethink.stepper import Stepper
from kvcomp import Method
from kvcomp.reasoner import path, task


class Walks:
    """Problems of one size, and the model that solves them.

    Attributes:
        prompt: [B, T] ids.
        gold: [B, tokens] ids of the right answers.
    """

    def __init__(self, nodes: int, count: int, tokens: int, dtype: torch.dtype = torch.float32):
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(path())
        self.model = AutoModelForCausalLM.from_pretrained(path()).to(dtype).eval()
        steps = -(-tokens // task.TOKENS_PER_STEP)
        self.problems = [task.make_problem(nodes, steps, seed) for seed in range(count)]
        prompts = [problem.prompt for problem in self.problems]
        self.prompt = torch.tensor(self.tokenizer(prompts)["input_ids"])  # all of one length
        words = [problem.gold().split()[:tokens] for problem in self.problems]
        self.gold = torch.tensor([self.tokenizer.convert_tokens_to_ids(w) for w in words])

    def stepper(self, method: Method) -> Stepper:
        return Stepper(self.model, method, self.prompt)

    def right(self, ids: Tensor) -> Tensor:
        """[B, tokens] bool: which tokens of the answers [B, tokens] belong to a right step."""
        answers = [self.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        marks = [right_words(p, a) for p, a in zip(self.problems, answers, strict=True)]
        return torch.tensor(marks)


def right_words(problem: task.Problem, words: Sequence[str]) -> list[bool]:
    """By the rule of `task.grade`: a step follows from the prompt and the step before as written.

    A share of these is a share of right steps that can be taken over any part of an answer.
    """
    facts, right = problem.facts, [False] * len(words)
    for first in range(len(words) - 3):
        if first == 0:
            node, total = problem.start, problem.start_sum
        else:
            before = task.split_steps(" ".join(words[max(first - 4, 0) : first]))
            if len(before) != 1 or before[0] is None:
                continue
            _, node, _, total = before[0]
        source = task.source_token(node, total)
        if words[first] == source and source in facts:
            target, weight = facts[source]
            expected = (target, str(weight), str((total + weight) % 10))
            if tuple(words[first + 1 : first + 4]) == expected:
                right[first : first + 4] = [True] * 4
    return right
