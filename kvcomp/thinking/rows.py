"""Rows: sequences that are decoded together, and leave the batch, and its memory, one by one.

Each row draws from random numbers of its own, so its tokens depend on seed and number alone: not on
the rows beside it, nor on when these leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.positions import fitting
from kvcomp.hf.prefill import packs, prefill
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.hf.wrapper import first_position
from kvcomp.methods import Delethink
from kvcomp.thinking.checks import is_count, is_number, require

# What the generation config of a model may ask for, and `Rows` does not do.
NOT_ASKED: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("return_dict_in_generate", "renormalize_logits", "output_scores"), False),
    **dict.fromkeys(("output_logits", "output_attentions", "output_hidden_states"), False),
    **dict.fromkeys(("min_new_tokens", "min_p", "typical_p", "top_h", "epsilon_cutoff")),
    **dict.fromkeys(("eta_cutoff", "bad_words_ids", "sequence_bias", "suppress_tokens")),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "guidance_scale", "stop_strings")),
    **dict.fromkeys(("watermarking_config", "prompt_lookup_num_tokens", "max_time")),
}

# Logits processors, or a function that makes them for prompts of so many columns.
Processors = Sequence[Any] | Callable[[int], Sequence[Any]]


@runtime_checkable
class Follower(Protocol):
    """Notes on the rows of a batch, such as those of a logits processor."""

    def select(self, rows: Tensor) -> None:
        """Rows of the batch become `rows` ([B'] int64 indices)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are those of the papers on parallel thoughts.

    Attributes:
        temperature: 0 is greedy.
        top_p: in 0..1, above 0.
        top_k: 0 turns it off.
        seed: of all rows.
        max_new_tokens: tokens of a row, at most.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0
    max_new_tokens: int = 8192

    def __post_init__(self) -> None:
        warm = is_number(self.temperature) and self.temperature >= 0
        require(warm, "temperature", "a number, at least 0", self.temperature)
        some = is_number(self.top_p) and 0 < self.top_p <= 1
        require(some, "top_p", "a share above 0, at most 1", self.top_p)
        require(is_count(self.top_k), "top_k", "tokens, at least 0", self.top_k)
        require(is_count(self.seed), "seed", "a number of at least 0", self.seed)
        require(
            is_count(self.max_new_tokens, 1),
            "max_new_tokens",
            "tokens, at least 1",
            self.max_new_tokens,
        )

    def for_generate(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`. Of the model's own generation config they
        leave the ends, as `Rows` does."""
        most = {"max_new_tokens": self.max_new_tokens, **NOT_ASKED}
        if not self.temperature:
            return most | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        warm = {"temperature": float(self.temperature), "top_p": self.top_p, "top_k": self.top_k}
        return most | {"do_sample": True, **warm}

    def warpers(self) -> list[Any]:
        chosen: list[Any] = []
        if self.temperature not in (0, 1):
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature and self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


@dataclass
class Row:
    """One sequence.

    Attributes:
        number: its place when decoding began.
        ids: its output.
        ended: whether it came to its end by itself.
    """

    number: int
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class Rows:
    """A batch under a run.

    Args:
        inputs: "input_ids" [B, n] and, where rows differ in length, "attention_mask" with padding
            on the left, as a tokenizer makes them.
        copies: rows made of each prompt, which is encoded once.
        processors: logits processors, or a function that makes them for prompts of so many columns;
            those that are `Follower`s hear of rows that leave.
        followers: others that do.
        eos: ids that end a row; default: the model's.

    Rows also stop, without having ended, at the last position that the model knows.

    Attributes:
        all: every row, by number; those that have left too.
        live: the rows in the batch.
        steps: forwards of one token.
        columns: of the prompts.

    Raises:
        ValueError: an argument out of range, or a prompt that takes all positions of the model.
    """

    def __init__(
        self,
        run: Run,
        inputs: Any,
        sampling: Sampling,
        *,
        copies: int = 1,
        processors: Processors = (),
        followers: Sequence[Follower] = (),
        eos: Sequence[int] | None = None,
    ) -> None:
        require(isinstance(run, Run), "run", "what kvcomp.patch returns", run)
        require(not isinstance(run, StaticRun), "run", "one without max_tokens", "a static run")
        require(is_count(copies, 1), "copies", "at least 1", copies)
        self.run, self.sampling = run, sampling
        self.eos = set(eos_of(run.model) if eos is None else eos)
        ids = torch.as_tensor(inputs["input_ids"])
        require(ids.ndim == 2 and ids.numel() > 0, "inputs", "ids [B, n]", list(ids.shape))
        self.most = fitting(
            *(run.model.config, run.method, ids.shape[1], sampling.max_new_tokens),
            "kvcomp.thinking: inputs",
        )
        if isinstance(run.method, Delethink) and run.method.budget is not None:
            self.most = min(self.most, run.method.budget)
        self.warpers = LogitsProcessorList(sampling.warpers())
        device = run.model.device
        ids = ids.to(device)
        mask = inputs.get("attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask.to(device)
        self.columns, self.steps = ids.shape[1], 0
        self.processors = list(processors(self.columns) if callable(processors) else processors)
        found = [*self.processors, *followers]
        self.followers: list[Follower] = [each for each in found if isinstance(each, Follower)]
        self.cache: Any = run.new_cache()
        if isinstance(self.cache, ChunkedCache):
            self.cache.announce(self.columns)
        self._ids, self._mask, self._begin = ids, mask, first_position(run.model)
        if mask is not None and packs(run):
            rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
            self.cache, logits = prefill(run, rows)
        else:
            logits = self._forward(ids, 0)
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
        self._ids = ids.repeat_interleave(copies, 0)
        self._mask = None if mask is None else mask.repeat_interleave(copies, 0)
        self._logits: Tensor | None = logits.repeat_interleave(copies, 0)
        self.all = [Row(number) for number in range(len(self._ids))]
        self.live = list(self.all)
        self._draws = [generator(sampling.seed, row.number, device) for row in self.all]

    def step(self) -> list[tuple[Row, int]]:
        """One more token for each row; those that it ends leave. Returns rows and tokens."""
        if self._logits is None:
            self._logits = self._forward(self._ids[:, -1:], self._ids.shape[1] - 1)
            self.steps += 1
        tokens, self._logits = self._draw(self._logits), None
        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        found = list(zip(self.live, tokens.tolist(), strict=True))
        for row, token in found:
            row.ids.append(token)
            row.ended = token in self.eos
        full = len(found[0][0].ids) >= self.most
        self.keep([row for row in self.live if not row.ended and not full])
        return found

    def keep(self, rows: Sequence[Row]) -> None:
        """The others leave the batch, and the cache."""
        numbers = {row.number for row in rows}
        places = [place for place, row in enumerate(self.live) if row.number in numbers]
        if len(places) == len(self.live):
            return
        self.live = [self.live[place] for place in places]
        if not places:
            self.cache.reset()
            return
        chosen = torch.tensor(places, device=self._ids.device)
        self.cache.batch_select_indices(chosen)
        for follower in self.followers:
            follower.select(chosen)
        self._ids = self._ids[chosen]
        self._mask = None if self._mask is None else self._mask[chosen]
        self._logits = None if self._logits is None else self._logits[chosen]
        self._draws = [self._draws[place] for place in places]

    def finish(self) -> None:
        """Decode until every row has ended or is full."""
        while self.live:
            self.step()

    @property
    def tokens(self) -> int:
        """Decoded by all rows."""
        return sum(len(row.ids) for row in self.all)

    def _forward(self, ids: Tensor, seen: int) -> Tensor:
        """Logits [B, vocabulary] behind new ids [B, n]."""
        given: dict[str, Any] = {}
        if self._mask is not None:
            places = (self._mask.cumsum(1) - 1).clamp(min=0)[:, seen : seen + ids.shape[1]]
            places = places + self._begin
            given = {"attention_mask": self._mask, "position_ids": places}
        if self.run.model._supports_logits_to_keep():
            given["logits_to_keep"] = 1
        with torch.no_grad():
            out = self.run.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **given)
        return out.logits[:, -1].float()

    def _draw(self, logits: Tensor) -> Tensor:
        for processor in self.processors:
            logits = processor(self._ids, logits)
        if not self.sampling.temperature:
            return logits.argmax(1)
        ids: Any = self._ids  # by its annotation a LongTensor, which no tensor is
        shares = self.warpers(ids, logits).softmax(1)
        pairs = zip(shares, self._draws, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=each) for row, each in pairs])


def eos_of(model: Any) -> list[int]:
    """The ids that end a text of the model."""
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Random numbers of one row."""
    mixed = hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(mixed, "big") >> 1)
