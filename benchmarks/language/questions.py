"""Questions inside real text, with answers that are known because they were put there.

pass-key: one number, at a depth that goes from the start to the end with the questions.
key-value: eight numbers of eight things; one is asked for.
variables: a number is given to a variable, which is given to another, and so on; the last is asked.
late N: as pass-key, asked once behind it, and again N tokens later.

A question is right when every token of the answer is the model's best, with those before it given;
greedy decoding would then say it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

from kvcomp.reading import TEXTS, opening

THINGS = ("apple", "river", "castle", "garden", "window", "candle", "bridge", "forest")
HOPS = 2
LATE = (0, 500, 2000)  # tokens between the two questions of `late`


@dataclass(frozen=True)
class Question:
    """A context of a given length that ends with the answer.

    Attributes:
        kind: of `kinds`.
        ids: tokens; the last `answer` of them are the answer.
        depth: where the fact is, 0 to 1.
    """

    kind: str
    ids: tuple[int, ...]
    answer: int
    depth: float


class Writer:
    """Writes questions over windows of a real text."""

    def __init__(self, tokenizer: Any, text: str = "reference") -> None:
        self.tokenizer = tokenizer
        self.start = list(opening(tokenizer))
        self.filler = self.encode(TEXTS[text]())

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def write(self, kind: str, place: int, count: int, tokens: int) -> Question:
        """Question `place` of `count` of a kind, of `tokens` tokens."""
        random = Random(f"{kind} {place}")
        number = str(random.randrange(10_000, 100_000))
        depth = (place + 0.5) / count
        asked = ""
        if kind == "pass-key":
            facts = {depth: f"The pass key is {number}. Remember it: {number} is the pass key."}
            asked = "The pass key is"
        elif kind.startswith("late"):
            facts = {depth * 0.3: f"The pass key is {number}. Remember it."}
            asked = "The pass key is"
        elif kind == "key-value":
            numbers = {thing: str(random.randrange(10_000, 100_000)) for thing in THINGS}
            wanted = THINGS[place % len(THINGS)]
            facts = {
                (order + 0.5) / len(THINGS): f"The number of the {thing} is {value}."
                for order, (thing, value) in enumerate(numbers.items())
            }
            number, asked = numbers[wanted], f"The number of the {wanted} is"
            depth = (THINGS.index(wanted) + 0.5) / len(THINGS)
        else:
            names = random.sample("ABCDEFGHKLMNPQRSTUVWXYZ", HOPS)
            facts = {0.1: f"VAR {names[0]} = {number}."}
            for hop, (before, name) in enumerate(itertools.pairwise(names), 1):
                facts[0.1 + 0.8 * hop / HOPS] = f"VAR {name} = VAR {before} = {number}."
            asked, depth = f"VAR {names[0]} =", 0.1
        return self._assemble(kind, facts, asked, number, depth, tokens, place)

    def _assemble(
        self,
        kind: str,
        facts: dict[float, str],
        asked: str,
        number: str,
        depth: float,
        tokens: int,
        place: int,
    ) -> Question:
        answer = self.encode(f" {number}")
        parts = {where: self.encode(f"\n\n{fact}\n\n") for where, fact in facts.items()}
        end = self.encode(f"\n\n{asked}") + answer
        room = tokens - len(self.start) - len(end) - sum(map(len, parts.values()))
        if kind.startswith("late"):  # attended once, then not for a while
            seen = self.encode(f"\n\n{asked} {number}.\n\n")
            room -= len(seen)
            parts[1 - int(kind.split()[1]) / room] = seen
        start = (place * 7919) % (len(self.filler) - room)
        filler, ids, used = self.filler[start : start + room], list(self.start), 0
        for where in sorted(parts):
            until = round(where * room)
            ids += filler[used:until] + parts[where]
            used = until
        ids += filler[used:] + end
        assert len(ids) == tokens
        return Question(kind, tuple(ids), len(answer), depth)


def kinds(tokens: int) -> tuple[str, ...]:
    """Those for contexts of so many tokens: `late` only where it fits behind the prompt."""
    late = (f"late {gap}" for gap in LATE if gap <= tokens * 0.6)
    return ("pass-key", "key-value", "variables", *late)
