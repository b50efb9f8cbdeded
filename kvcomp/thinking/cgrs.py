"""CGRS (arXiv 2508.05337): suppress words of reflection where the model is certain already.

At the end of each paragraph a tentative answer a_1..a_n is decoded beside the trace and thrown
away. Its certainty is C = 1 - mean_i H(p_ai) / log|V|, with H the entropy of the full next-token
distribution. Until the next paragraph ends, each step suppresses the words with probability
max(0, (C - delta) / (1 - delta)).

The paper does not say how long a tentative answer is: here up to and with its closing text, or
`answer` tokens. Entropies are those of the raw logits.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.hf.trial import trial
from kvcomp.thinking.checks import is_count, is_number, require, require_texts
from kvcomp.thinking.words import TAIL, ends_with, spellings

WORDS = ("Wait", "But", "Alternatively", "Alternative", "Hmm")
PROBE = "\n\n**Final Answer:** \\boxed{"


def certainty(entropies: Tensor, vocabulary: int) -> Tensor:
    """C of rows of entropies [R, n] in nats, NaN behind the end of an answer; [R] in 0..1."""
    return 1 - entropies.nanmean(1) / math.log(vocabulary)


class Cgrs(LogitsProcessor):
    """Certainty-guided suppression of reflection, for one `generate` at a time.

    Args:
        run: of `kvcomp.patch`, whose caches are probed.
        delta: certainty from which words are suppressed.
        probe: text that asks for a tentative answer.
        close: text that ends it.
        answer: tokens of it, at most.
        lazy: probe only where the likeliest next token is one of the words.
        rate: suppress with this probability instead, at every step, and probe nothing.
        words: suppressed in all spellings of the vocabulary.
        ends: texts that end a paragraph.
        seed: of the draws.

    Attributes:
        probes, trial_tokens: tentative answers, and tokens fed or decoded for them.
        suppressed: steps of rows in which the words were suppressed; `generate` makes steps of rows
            that have ended, too.
        certainties: of all probes, in their order.

    Raises:
        ValueError: a value out of range, a static run, or a model without such words.
    """

    stepwise = True  # its calls are steps, but for loops that know a `Looking` processor

    def __init__(
        self,
        run: Run,
        tokenizer: Any,
        *,
        delta: float = 0.9,
        probe: str = PROBE,
        close: str = "}",
        answer: int = 32,
        lazy: bool = False,
        rate: float | None = None,
        words: tuple[str, ...] = WORDS,
        ends: tuple[str, ...] = ("\n\n",),
        seed: int = 0,
    ) -> None:
        require(isinstance(run, Run), "Cgrs: run", "what kvcomp.patch returns", run)
        require(not isinstance(run, StaticRun), "Cgrs: run", "one without max_tokens", "static")
        require(is_number(delta) and 0 <= delta < 1, "Cgrs: delta", "a number in 0..1", delta)
        require(is_count(answer, 1), "Cgrs: answer", "tokens, at least 1", answer)
        require(
            rate is None or (is_number(rate) and 0 <= rate <= 1),
            "Cgrs: rate",
            "a probability, or None",
            rate,
        )
        require(isinstance(close, str) and close != "", "Cgrs: close", "a text", close)
        require_texts(words, "Cgrs: words")
        require_texts(ends, "Cgrs: ends")
        self.run, self.tokenizer, self.delta, self.answer = run, tokenizer, delta, answer
        self.close, self.lazy, self.rate, self.ends, self.seed = close, lazy, rate, ends, seed
        self.probe = tokenizer.encode(probe, add_special_tokens=False)
        require(bool(self.probe), "Cgrs: probe", "a text with tokens", probe)
        self.words = torch.tensor(spellings(tokenizer, words, caller="Cgrs"))
        self.probes = self.trial_tokens = self.suppressed = 0
        self.certainties: list[float] = []
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Another generation of so many rows begins."""
        self._text: Tensor | None = None  # [rows, columns] of the latest step
        self._rates = [self.rate or 0.0] * rows  # p of each since its last paragraph ended
        self._rows = list(range(rows))  # their numbers when decoding began
        self._counted = [0] * rows  # columns up to which `suppressed` has counted

    def select(self, rows: Tensor) -> None:
        """Rows of the batch become `rows` ([B'] int64 indices)."""
        self._rates = [self._rates[row] for row in rows.tolist()]
        self._rows = [self._rows[row] for row in rows.tolist()]
        self._counted = [self._counted[row] for row in rows.tolist()]
        self._text = None if self._text is None else self._text[rows.to(self._text.device)]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._follow(input_ids)
        return self._of(list(range(len(input_ids))), input_ids, scores)

    def _follow(self, ids: Tensor) -> None:
        """Find the rows of the step before; beams change places, and another text begins anew."""
        text, before = self._text, ids[:, :-1]
        if text is None or text.shape != before.shape:
            self.begin(len(ids))
        elif not torch.equal(text, before):
            same = (before[:, None] == text[None]).all(2)
            if bool(same.any(1).all()):
                origin = same.int().argmax(1).tolist()
                self._rates = [self._rates[row] for row in origin]
            else:
                self.begin(len(ids))
        self._text = ids

    def looks(self, ids: Tensor) -> bool:
        """Whether the cache is probed behind a prefix [1, n], which it must hold, and no more."""
        return self.rate is None and ends_with(self.tokenizer, ids, self.ends)[0]

    def behind(self, row: int, ids: Tensor, scores: Tensor) -> Tensor:
        """As a call, for one row of the batch at any of its columns: ids [1, n], scores [1, V]."""
        return self._of([row], ids, scores)

    def _of(self, rows: list[int], ids: Tensor, scores: Tensor) -> Tensor:
        self.words = self.words.to(scores.device)
        if self.rate is None:
            self._renew(rows, ids, scores)
        columns = ids.shape[1]
        drawn = [
            random.Random(f"{self.seed}/{self._rows[row]}/{columns}").random() < self._rates[row]
            for row in rows
        ]
        for row, suppresses in zip(rows, drawn, strict=True):
            self.suppressed += suppresses and columns > self._counted[row]
            self._counted[row] = max(columns, self._counted[row])
        if not any(drawn):
            return scores
        hidden = scores.index_fill(1, self.words, torch.finfo(scores.dtype).min)
        return torch.where(torch.tensor(drawn, device=scores.device)[:, None], hidden, scores)

    def _renew(self, rows: list[int], ids: Tensor, scores: Tensor) -> None:
        """Probe the rows whose paragraph has just ended."""
        ended = torch.tensor(ends_with(self.tokenizer, ids, self.ends))
        if self.lazy:
            ended &= torch.isin(scores.argmax(1), self.words).cpu()
        asked = torch.tensor(rows)[ended]
        if len(asked):
            self._check(rows, ids)
            for row, sure in zip(asked.tolist(), self._probe(asked).tolist(), strict=True):
                self.certainties.append(sure)
                self._rates[row] = max(0.0, (sure - self.delta) / (1 - self.delta))

    def _check(self, rows: list[int], ids: Tensor) -> None:
        """Raise ValueError where the latest cache of the run is one of another text."""
        cache = self.run.latest
        known = None if cache is None else cache.text.known(cache.columns)
        if cache is not None and known is not None:
            seen, same = cache.kv.layers[0].seen().to(known.device), len(known) > max(rows)
            for row, given in zip(rows if same else [], ids.to(known.device), strict=False):
                own = known[row, seen[row]][-TAIL:]  # without the gaps that drafts leave
                same &= torch.equal(own, given[-len(own) :])
            expected = "the run under which the model decodes"
            require(same, "Cgrs: run", expected, "one whose latest cache has another text")

    def _probe(self, rows: Tensor) -> Tensor:
        """C of rows [R], by answers that are decoded greedily and thrown away."""
        entropies = []
        device = self.run.model.device
        with trial(self.run, rows.to(device)) as beside:
            ids = torch.tensor([self.probe], device=device).expand(len(rows), -1)
            logits = beside.feed(ids)
            answer = ids[:, :0]
            open_rows = torch.ones(len(rows), dtype=torch.bool)
            while True:
                log_p = logits.log_softmax(1)
                entropy = -(log_p.exp() * log_p).nan_to_num(0).sum(1).cpu()
                entropies.append(entropy.masked_fill(~open_rows, float("nan")))
                token = logits.argmax(1, keepdim=True)
                answer = torch.cat([answer, token], 1)
                texts = self.tokenizer.batch_decode(token.tolist())
                open_rows &= torch.tensor([self.close not in text for text in texts])
                if not bool(open_rows.any()) or answer.shape[1] == self.answer:
                    break
                logits = beside.feed(token)
        self.probes += len(rows)
        self.trial_tokens += len(rows) * (len(self.probe) + answer.shape[1] - 1)
        return certainty(torch.stack(entropies, 1), logits.shape[1])
