"""Ask: prompts in, texts out; what the drivers of several rounds are written over.

A driver needs no more than `ask(prompts) -> replies`, so it can be given any function of that form,
such as one that asks a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvcomp.hf.run import Run
from kvcomp.thinking.checks import require
from kvcomp.thinking.rows import Processors, Rows, Sampling
from kvcomp.thinking.votes import Reply
from kvcomp.thinking.words import end_of_thinking

AskFunction = Callable[[Sequence[str]], Sequence[Reply]]


class Ask:
    """Ask the model of a run; prompts of one call are decoded as one batch, a text that is asked
    several times is encoded once.

    Args:
        run: of `kvcomp.patch`, with any method.
        chat: put prompts into the chat template; None: if the tokenizer has one.
        end: text of the token that ends a thought; None: the model's own tag, if it has one.
        processors: as for `Rows`.
        sampling: fields of `Sampling`; each call draws anew.

    Raises:
        ValueError: a value out of range, or a chat template is asked for and there is none.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: Any,
        *,
        chat: bool | None = None,
        end: str | None = None,
        processors: Processors = (),
        **sampling: Any,
    ) -> None:
        require(isinstance(run, Run), "Ask: run", "what kvcomp.patch returns", run)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        require(not chat or has_template, "Ask: chat", "a tokenizer with a chat template", chat)
        self.run, self.tokenizer, self.processors = run, tokenizer, processors
        self.chat = has_template if chat is None else chat
        self.sampling = Sampling(**sampling)
        self.end: int | None = None
        try:
            self.end = end_of_thinking(tokenizer, end, caller="Ask")
        except ValueError:
            if end is not None:
                raise
        self.calls = 0

    def __call__(self, prompts: Sequence[str]) -> list[Reply]:
        encoded = [self._encode(prompt) for prompt in prompts]
        seed = self.sampling.seed * 1_000_003 + self.calls
        self.calls += 1
        same = all(ids == encoded[0] for ids in encoded)
        rows = Rows(
            self.run,
            _padded(encoded[:1] if same else encoded),
            replace(self.sampling, seed=seed),
            copies=len(encoded) if same else 1,
            processors=self.processors,
        )
        rows.finish()
        return [self._reply(ids, row.ids) for ids, row in zip(encoded, rows.all, strict=True)]

    def cut(self, text: str, tokens: int) -> str:
        """The last `tokens` tokens of a text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= tokens else self.tokenizer.decode(ids[-tokens:])

    def _encode(self, prompt: str) -> list[int]:
        if not self.chat:
            return list(self.tokenizer(prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _reply(self, prompt: list[int], ids: list[int]) -> Reply:
        behind = ids[ids.index(self.end) + 1 :] if self.end in ids else ids
        text, solution = (self.tokenizer.decode(x, skip_special_tokens=True) for x in (ids, behind))
        return Reply(text, solution.strip(), len(prompt), len(ids))


def _padded(rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask [B, longest], padding on the left."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
