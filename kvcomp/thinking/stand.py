"""STAND: speculation without a draft model, from what the model itself has said (arXiv 2506.04708).

A thought repeats itself. So the model's own next-token distributions, kept by the last 4, 3 or 2
tokens, draft the next ones, and one forward checks them all. The tokens are those of decoding
without, greedy or drawn by noise (see `noise`), under every method that can check drafts.

Departures from the paper: a chain of drafts, where it has a tree tuned on samples; a draft is kept
where the check draws the very same token from the same noise, where the paper accepts by rejection
sampling; and the number of drafts in a forward is the one that wins most tokens per second, by
what forwards have taken so far and drafts have won, down to none.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.drafting import refuse_processors
from kvcomp.hf.rotation import changes_with_length
from kvcomp.hf.static_cache import StaticCache
from kvcomp.thinking.checks import is_count, is_number, require
from kvcomp.thinking.ngrams import NgramTable
from kvcomp.thinking.noise import GumbelNoise, gumbel
from kvcomp.thinking.pace import Pace

# Processors for which a row is like any other.
OF_ANY_ROW = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper


class Stand:
    """Decode several tokens in a forward: `model.generate(**inputs, custom_generate=Stand())`.

    The table of n-grams stays from call to call, for further samples of one question.

    Args:
        orders: lengths of the contexts that are looked up, the longest first.
        top: tokens of an entry.
        depth: drafts in a forward, at most.
        sure: a chain of drafts ends where the product of their probabilities falls below this.
        seed: of the draws, where `generate` samples.
        streamer: gets the tokens of a single row. `generate` keeps its own from a
            `custom_generate`, so give it to both.
        adapt: check as many drafts as pay, see `pace`, which may be none. The tokens are the same.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        *,
        orders: tuple[int, ...] = (4, 3, 2),
        top: int = 10,
        depth: int = 7,
        sure: float = 0.3,
        seed: int = 0,
        streamer: Any = None,
        adapt: bool = True,
    ) -> None:
        good = (
            isinstance(orders, tuple | list) and len(orders) and all(is_count(n, 1) for n in orders)
        )
        require(bool(good), "Stand: orders", "lengths of at least 1 token", orders)
        require(is_count(top, 1), "Stand: top", "at least 1 token", top)
        require(is_count(depth, 1), "Stand: depth", "at least 1 draft", depth)
        require(is_number(sure) and 0 <= sure <= 1, "Stand: sure", "a probability", sure)
        require(isinstance(adapt, bool), "Stand: adapt", "True or False", adapt)
        self.table = NgramTable(sorted(orders, reverse=True), top)
        self.depth, self.sure, self.adapt = depth, sure, adapt
        self.noise, self.streamer = GumbelNoise(seed), streamer
        self._words: int | None = None  # in the vocabulary that the table is about

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate(custom_generate=...)` calls: [B, tokens] ids, or an output with them.

        Raises:
            ValueError: a model that is not patched, beams, scores as an output, a method under
                which drafts cannot be checked, or a logits processor that remembers the steps
                before; before anything is decoded.
        """
        cache: Any = model_kwargs.get("past_key_values")
        streamer = self.streamer if streamer is None else streamer
        _refuse(model, cache, generation_config)
        refuse_processors(logits_processor)
        words = model.config.get_text_config(decoder=True).vocab_size
        if self._words != words:
            self.table.clear()
        self._words = words
        decoding = _Decoding(
            self, model, input_ids, logits_processor, stopping_criteria, generation_config
        )
        try:
            decoding.run(cache, streamer, model_kwargs)
        except BaseException:
            cache.drop_drafts()
            raise
        sequences = decoding.sequences()
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        ids: Any = sequences  # by its annotation a LongTensor, which no tensor is
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)

    def draft(
        self,
        contexts: list[list[int]],
        numbers: list[int],
        places: list[int],
        most: int,
        noise: Any,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The likely next tokens of rows behind their last ones, and how likely each is right.

        Args:
            contexts: the last tokens of each row.
            numbers: of the rows.
            places: tokens of each row so far.
            most: drafts of a row, at most.
            noise: a `GumbelNoise`; None: the likeliest.
        """
        drafts: list[list[int]] = [[] for _ in contexts]
        likely: list[list[float]] = [[] for _ in contexts]
        contexts, alive = list(contexts), list(range(len(contexts)))
        for depth in range(most):
            found = {row: self.table.find(contexts[row]) for row in alive}
            entries = {row: entry for row, entry in found.items() if entry is not None}
            if not entries:
                break
            alive = list(entries)
            best = [0] * len(alive)
            if noise is not None:
                known = torch.from_numpy(np.stack([tokens for tokens, _ in entries.values()]))
                scores = torch.from_numpy(np.stack([probs for _, probs in entries.values()]))
                at = torch.tensor([(numbers[row], places[row] + depth) for row in alive])
                rows, ends = at.repeat_interleave(known.shape[1], 0).unbind(1)
                drawn = gumbel(noise.seed, rows, ends, known.flatten().long())
                best = (scores.double().log() + drawn.view_as(known)).argmax(1).tolist()
            for row, choice in zip(list(alive), best, strict=True):
                tokens, probs = entries[row]
                chance = (likely[row][-1] if depth else 1.0) * float(probs[0])
                if chance < self.sure:
                    alive.remove(row)
                    continue
                likely[row].append(chance)
                drafts[row].append(int(tokens[choice]))
                contexts[row] = [*contexts[row][1:], drafts[row][-1]]
        return drafts, likely


class _Decoding:
    """One call of `generate`."""

    def __init__(
        self, stand: Stand, model: Any, ids: Tensor, processors: Any, stopping: Any, config: Any
    ) -> None:
        self.stand, self.model, self.stopping, self.config = stand, model, stopping, config
        self.processors = [p for p in processors if not isinstance(p, GumbelNoise)]
        given = [p for p in processors if isinstance(p, GumbelNoise)]
        self.noise = given[0] if given else stand.noise if config.do_sample else None
        self.prompt, self.most = ids.shape[1], config.max_length
        room = max(self.most - self.prompt, 1) + stand.depth + 1
        self.ids = torch.nn.functional.pad(ids, (0, room))  # a row's tokens, then its drafts
        self.rows = ids.tolist()
        self.ahead: list[list[int]] = [[] for _ in self.rows]  # checked, while others catch up
        self.ended = [False] * len(self.rows)
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad)
        self.pace = Pace(stand.depth) if stand.adapt else None

    def run(self, cache: Any, streamer: Any, model_kwargs: dict) -> None:
        seen = int(cache.get_seq_length())
        inputs = self.model.prepare_inputs_for_generation(
            self.ids[:, : self.prompt],
            next_sequence_length=self.prompt - seen if seen else None,
            is_first_iteration=True,
            **model_kwargs,
        )
        last = _last_positions(self.model, inputs)
        self.apart = not (
            seen
            or last is None
            or len(self.rows) == 1
            or self.config.return_dict_in_generate  # a cache without gaps is given back
            or isinstance(cache, ChunkedCache)
            or cache.kv.method.in_step
            or not cache.all_managed
        )
        logits = self.model(**inputs, return_dict=True).logits[:, -1:]
        # Positions behind a row's tokens; None: the model finds them by itself.
        self.offset: Tensor | None = None
        if isinstance(cache, Cache) and last is not None:
            self.offset = last + 1 - cache.kv.layers[0].logical_lens[:, None].to(last.device)
        for row in self.rows[:1]:  # copies of one prompt, or one of several
            self.stand.table.read(row)
        mask = model_kwargs.get("attention_mask")
        self._take(self._picked(logits, [[] for _ in self.rows]), streamer)
        while not all(self.ended):
            began, active = time.perf_counter(), self.ended.count(False)
            drafts, expected = self._drafts(cache)
            width = 1 + max(map(len, drafts))
            logits = self._forward(cache, drafts, width, mask)
            picked = self._picked(logits, drafts)
            counts = [
                width if ended else len(each)
                for each, ended in zip(picked, self.ended, strict=True)
            ]
            if not self.apart:
                counts = [min(counts)] * len(counts)
            if self.staged:
                cache.commit(torch.tensor(counts) if self.apart else counts[0])
            self.ahead = [each[n:] for each, n in zip(picked, counts, strict=True)]
            new = [each[:n] for each, n in zip(picked, counts, strict=True)]
            self._take(new, streamer)
            if self.pace is not None:
                right = sum(map(len, new)) - active
                self.pace.note(width - 1, time.perf_counter() - began, expected, right)

    def _drafts(self, cache: Any) -> tuple[list[list[int]], float]:
        """Of each row, behind its newest token; and how many of all to expect to be right."""
        longest = self.stand.table.orders[0]
        left = [self.most - len(row) for row in self.rows]
        most = max(int(min(self.stand.depth, cache.room - 1, max(left) - 1)), 0)
        drafts: list[list[int]] = [[] for _ in self.rows]
        numbers = [number for number, ended in enumerate(self.ended) if not ended]
        ahead = [self.ahead[number] for number in numbers]
        contexts = [
            [*self.rows[number][-longest:], *known][-longest:]
            for number, known in zip(numbers, ahead, strict=True)
        ]
        places = [
            len(self.rows[number]) + len(known)
            for number, known in zip(numbers, ahead, strict=True)
        ]
        guessed, likely = self.stand.draft(contexts, numbers, places, most, self.noise)
        chances = [
            [*[1.0] * len(known), *chance][:most]
            for known, chance in zip(ahead, likely, strict=True)
        ]
        hopes = [self._hope(column) for column in zip_longest(*chances, fillvalue=0.0)]
        if self.pace is not None:
            most = max(self.pace.drafts(len(numbers), hopes), *map(len, ahead))
        for number, known, more in zip(numbers, ahead, guessed, strict=True):
            drafts[number] = [*known, *more][:most]
        return drafts, sum(hopes[:most])

    def _hope(self, chances: Sequence[float]) -> float:
        """How many rows take a draft that each takes with a chance of its own."""
        return sum(chances) if self.apart else len(chances) * math.prod(chances)

    def _forward(
        self, cache: Any, drafts: list[list[int]], width: int, mask: Tensor | None
    ) -> Tensor:
        device = self.ids.device
        table = [
            [row[-1], *each, *[self.pad] * (width - 1 - len(each))]
            for row, each in zip(self.rows, drafts, strict=True)
        ]
        ids = torch.tensor(table, device=device)
        for number, row in enumerate(self.rows):
            end = min(len(row) + width - 1, self.ids.shape[1])
            self.ids[number, len(row) : end] = ids[number, 1 : 1 + end - len(row)]
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if isinstance(cache, Cache):
            if self.offset is not None:
                first = cache.kv.layers[0].logical_lens[:, None].to(device) + self.offset
                given["position_ids"] = first + torch.arange(width, device=device)
            if not cache.all_managed and mask is not None:
                more = cache.columns + width - mask.shape[1]
                given["attention_mask"] = torch.nn.functional.pad(mask, (0, more), value=1)
        # Layers of transformers that record what they could take back wait for it at every step.
        self.staged = width > 1 or not getattr(cache, "all_managed", True)
        if self.staged:
            cache.stage()
        return self.model(input_ids=ids, **given).logits

    def _picked(self, logits: Tensor, drafts: list[list[int]]) -> list[list[int]]:
        """Of each row, the drafts that are right and the token behind them."""
        picked: list[list[int]] = [[] for _ in drafts]
        places, scores = [], []
        alive = [number for number, ended in enumerate(self.ended) if not ended]
        plain = self.noise is None and not self.processors
        best = logits.argmax(-1).tolist() if plain else None
        for place in range(logits.shape[1]):
            rows = torch.tensor(alive, device=logits.device)
            found = logits[rows, place].float()
            if best is None:
                tokens, found = self._pick(alive, rows, place, found)
            else:
                tokens = [best[number][place] for number in alive]
            places += [(number, place) for number in alive]
            scores.append(found)
            for number, token in zip(alive, tokens, strict=True):
                picked[number].append(token)
            alive = [
                number
                for number in alive
                if drafts[number][place : place + 1] == picked[number][-1:]
            ]
            if not alive:
                break
        self._learn(places, picked, torch.cat(scores))
        return picked

    def _pick(
        self, alive: list[int], rows: Tensor, place: int, scores: Tensor
    ) -> tuple[list[int], Tensor]:
        """The tokens of some rows by scores [R, V] behind their drafts up to `place`, and the
        scores that logits processors leave."""
        ends = [len(self.rows[number]) + place for number in alive]
        if all(isinstance(each, OF_ANY_ROW) for each in self.processors):
            for processor in self.processors:
                scores = processor(self.ids[rows], scores)
        else:
            parts = zip(alive, ends, scores.split(1), strict=True)
            scores = torch.cat([self._processed(*part) for part in parts])
        if self.noise is None:
            return scores.argmax(-1).tolist(), scores
        positions = torch.tensor(ends, device=scores.device)
        return self.noise.draw(scores, rows, positions).tolist(), scores

    def _processed(self, number: int, end: int, scores: Tensor) -> Tensor:
        """Scores [1, V] of a row of `end` tokens as the logits processors leave them."""
        prefix = self.ids[number : number + 1, :end]
        for processor in self.processors:
            if len(self.rows) == 1 or isinstance(processor, OF_ANY_ROW):
                scores = processor(prefix, scores)
            else:
                scores = processor(self._in_place(prefix), self._in_place(scores))[[number]]
        return scores

    def _in_place(self, row: Tensor) -> Tensor:
        """A row [1, n] at each number [B, n], for what tells rows apart by their numbers."""
        return row.repeat(len(self.rows), 1)

    def _learn(
        self, places: list[tuple[int, int]], picked: list[list[int]], scores: Tensor
    ) -> None:
        """Scores [n, V] of rows behind so many of their picked tokens."""
        table = self.stand.table
        probs, ids = scores.softmax(-1).topk(min(table.top, scores.shape[-1]))
        for (number, place), each, p in zip(places, ids.tolist(), probs.tolist(), strict=True):
            if place >= len(self.ahead[number]):  # or learnt when they were checked first
                context = self.rows[number][-table.orders[0] :]
                table.learn([*context, *picked[number][:place]], each, p)

    def _take(self, new: list[list[int]], streamer: Any) -> None:
        """Tokens of each row are true, up to where it ends."""
        for number, tokens in enumerate(new):
            row = self.rows[number]
            for token in tokens:
                if self.ended[number]:
                    break
                self.ids[number, len(row)] = token
                row.append(token)
                prefix = self.ids[number : number + 1, : len(row)]
                self.ended[number] = bool(self.stopping(self._in_place(prefix), None)[number])
                if streamer is not None:
                    streamer.put(torch.tensor([token]))

    def sequences(self) -> Tensor:
        longest = max(map(len, self.rows))
        padded = [[*row, *[self.pad] * (longest - len(row))] for row in self.rows]
        return torch.tensor(padded, device=self.ids.device, dtype=self.ids.dtype)


def _last_positions(model: Any, inputs: Any) -> Tensor | None:
    """Positions [B, 1] of the last tokens that `generate` hands to a model; None: it takes none,
    and counts columns."""
    told = inputs.get("position_ids")
    if told is None or "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    return told.view(-1, *told.shape[-2:])[0, :, -1:]


def _refuse(model: Any, cache: Any, config: Any) -> None:
    """Raise ValueError, with the reason, for what `Stand` cannot do."""
    known = isinstance(cache, Cache | ChunkedCache) and not isinstance(cache, StaticCache)
    require(
        known,
        "Stand",
        "a model under kvcomp.patch(model, method), without max_tokens",
        type(cache).__name__,
    )
    beams = config.num_beams or 1
    require(beams == 1, "Stand: num_beams", "1, as drafts have one next token", beams)
    scores = bool(config.output_scores or config.output_logits)
    require(not scores, "Stand: output_scores, output_logits", "False", scores)
    context = cache.context if isinstance(cache, ChunkedCache) else cache
    method: Any = context.kv.method
    if (reason := context.drafts_refused) is not None:
        raise ValueError(
            f"kvcomp.thinking: Stand: {method.name} cannot check several tokens at once: {reason}"
        )
    if changes_with_length(model):
        raise ValueError(
            f"kvcomp.thinking: Stand: {type(model).__name__} changes its rotary frequencies with"
            " the length, which drafts may cross"
        )
