"""Where a fact is lost: how dense attention treats it until it is asked for, and who still has it.

Of each pass key of `questions`, just before it is asked for: how long dense attention has not hit
its digits, how many of them are among the tokens hit last, and how many the question itself hits;
and the share of them that an evicting method of the same size still holds. A hit is a probability
of at least 1 / B under any head of a KV head, where B is the number of tokens the method keeps.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.record import meta
from harness.store import Row, Store
from kvcomp import METHODS, Method, patch
from kvcomp.methods.eviction import Eviction
from language.capture import Attention
from language.lineup import Contender, Lineup
from language.loss import PROMPT_SHARE
from language.questions import Question, Writer
from language.settings import settings

KEY = ("method", "bound")
KIND = "pass-key"


@dataclass(frozen=True)
class Fact:
    """Where the digits of a pass key are in its context: the tokens of each mention."""

    question: Question
    asked: int
    mentions: tuple[tuple[int, ...], ...]

    @property
    def digits(self) -> list[int]:
        return [place for mention in self.mentions for place in mention]


class Facts:
    """Cells: a method that evicts, at a bound, on the pass keys.

    Raises:
        ValueError: a bad option, a model without full attention everywhere, or a file with other
            settings.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Namespace) -> None:
        self.model, self.options = model, options
        self.prompt = options.tokens // PROMPT_SHARE
        evicting = [each for each in options.methods if _evicts(each)]
        if not evicting:
            raise ValueError(
                "kvcomp.language: --methods: expected one that evicts, got"
                f" {' '.join(options.methods)}"
            )
        chosen = Namespace(**{**vars(options), "methods": evicting, "kv": ["model"]})
        self.lineup = Lineup(model, chosen, options.tokens, self.prompt)
        writer = Writer(tokenizer)
        self.facts = [
            find(writer.write(KIND, place, options.questions, options.tokens), writer)
            for place in range(options.questions)
        ]
        common = settings(model, options, self.prompt, questions=options.questions)
        facts = meta(
            "language-facts", model.device.type, context_bytes=self.lineup.room.context_bytes
        )
        self.store = Store(options.json, KEY, common, facts)

    def run(self, bar: Callable[[str, int], Callable[[], None]]) -> Iterator[Row]:
        """The cells that are not there yet."""
        for each, row, method in self.lineup.left(self.store):
            if method is not None:
                tick = bar(f"{each.label} {row['bound']}", len(self.facts))
                row["facts"] = [self._look(method, fact, tick) for fact in self.facts]
            self.store.add(row)
            yield row

    def _look(self, method: Method, fact: Fact, tick: Callable[[], None]) -> Row:
        ids = torch.tensor(fact.question.ids, device=self.model.device)
        held = self._held(method, ids[: fact.asked], fact.digits)
        dense = attended(Attention(self.model, ids), fact, method.budget)
        tick()
        return {
            "depth": fact.question.depth,
            "since_fact": fact.asked - fact.digits[-1],
            **dense,
            "held": held,
        }

    @torch.no_grad()
    def _held(self, method: Method, ids: Tensor, digits: list[int]) -> float:
        """The share of `digits` in the cache when `ids` were read, over all layers and KV heads."""
        decoder, shares = self.model.get_decoder(), []
        wanted = torch.tensor(digits, device=ids.device)
        units = self.model.config.num_key_value_heads
        with patch(self.model, method) as run:
            cache = run.new_cache()
            decoder(ids[None, : self.prompt], past_key_values=cache)
            for layer in cache.layers:
                layer.kv.positions(units)  # followed from here on
            for token in ids[self.prompt :]:
                decoder(token[None, None], past_key_values=cache)
            for layer in cache.layers:
                kept = layer.kv.positions(units)[0]
                shares += [torch.isin(wanted, unit).float().mean() for unit in kept]
        return torch.stack(shares).mean().item()


def find(question: Question, writer: Writer) -> Fact:
    """The mentions of the answer before it is asked for."""
    ids, answer = question.ids, question.ids[-question.answer :]
    asked = len(ids) - question.answer - len(writer.encode("\n\nThe pass key is"))
    digits = [token for token in answer if writer.tokenizer.decode([token]).strip()]
    count = len(digits)
    starts = [i for i in range(asked - count + 1) if list(ids[i : i + count]) == digits]
    return Fact(question, asked, tuple(tuple(range(i, i + count)) for i in starts))


def attended(attention: Attention, fact: Fact, budget: int) -> Row:
    """What dense attention did to a fact: medians and shares over layers, KV heads and digits."""
    asked, digits = fact.asked, torch.tensor(fact.digits)
    silent, lately, hit_by_question = [], [], []
    for layer, (q, k, _) in enumerate(attention.layers):
        probs = attention.probabilities(layer, torch.arange(q.shape[1] - 1))
        hit = probs.unflatten(0, (len(k), -1)).amax(1) >= 1 / budget  # [Hkv, steps, tokens]
        steps = torch.arange(asked)[:, None]
        last = torch.where(hit[:, :asked, :asked], steps, -1).amax(1)  # [Hkv, tokens]
        of_digits = last[:, digits]
        silent.append(asked - of_digits.flatten())
        rank = (last[:, None, :] > of_digits[:, :, None]).sum(-1)
        lately.append((rank < budget).float().flatten())
        hit_by_question.append(hit[:, asked:, digits].any(1).float().flatten())
    return {
        "since_hit": torch.cat(silent).median().item(),
        "hit_lately": torch.cat(lately).mean().item(),
        "hit_by_question": torch.cat(hit_by_question).mean().item(),
    }


def line(row: Row, context_bytes: int) -> str:
    head = f"{row['method']} {row['bound']}"
    if "reason" in row:
        return f"{head} {row['reason']}"
    return "\n".join(
        [
            f"{head}: {row['parameters']}",
            *(
                f"  {each['since_fact']:5} tokens since the fact, {each['since_hit']:5.0f} since"
                f" its last hit, {each['hit_lately']:4.0%} of its digits among those hit last,"
                f" {each['hit_by_question']:4.0%} hit by the question, {each['held']:4.0%} held"
                for each in row["facts"]
            ),
        ]
    )


def _evicts(label: str) -> bool:
    name = Contender(label).name
    return name not in METHODS or issubclass(METHODS[name], Eviction)
