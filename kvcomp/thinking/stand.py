"""STAND: speculation without a draft model, from what the model itself has said (arXiv 2506.04708).

A thought repeats itself. So the model's own next-token distributions, kept by the last 4, 3 or 2
tokens, draft the next ones, and one forward checks them all. The tokens are those of decoding
without, greedy or drawn by noise (see `noise`), under every method that can check drafts.

Departures from the paper: a chain of drafts, where it has a tree tuned on samples; a draft is kept
where the check draws the very same token from the same noise, where the paper accepts by rejection
sampling; a chain ends where it has become unlikely; and nothing is drafted for a while where that
costs more time than it saves.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

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
        adapt: stop drafting for a while where it is no gain. The tokens are the same.

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

    def draft(self, context: list[int], row: int, place: int, most: int, noise: Any) -> list[int]:
        """The likely next tokens of a row behind its last ones, at most so many.

        Args:
            place: tokens of the row so far.
            noise: a `GumbelNoise`; None: the likeliest.
        """
        drafts: list[int] = []
        likely = 1.0
        while len(drafts) < most and (entry := self.table.find(context)) is not None:
            tokens, probs = entry
            best = 0
            if noise is not None:
                known = torch.from_numpy(tokens).long()
                scores = torch.from_numpy(probs).double().log()
                rows = torch.full_like(known, row)
                scores += gumbel(noise.seed, rows, place + len(drafts), known)
                best = int(scores.argmax())
            likely *= float(probs[best]) if noise is None else float(probs[0])
            if likely < self.sure:
                break
            drafts.append(int(tokens[best]))
            context = [*context[1:], drafts[-1]]
        return drafts


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
        self.pace = Pace() if stand.adapt else None

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
            drafts = self._drafts(cache)
            began, active = time.perf_counter(), self.ended.count(False)
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
            if self.pace is not None:
                self.pace.note(width > 1, time.perf_counter() - began, sum(map(len, new)) / active)
            self._take(new, streamer)

    def _drafts(self, cache: Any) -> list[list[int]]:
        """Of each row, behind its newest token."""
        longest = self.stand.table.orders[0]
        left = [self.most - len(row) for row in self.rows]
        most = int(min(self.stand.depth, cache.room - 1, max(left) - 1))
        if self.pace is not None and not self.pace.drafts():
            most = min(most, max(map(len, self.ahead)))
        drafts: list[list[int]] = []
        for number, (row, known) in enumerate(zip(self.rows, self.ahead, strict=True)):
            if self.ended[number]:
                drafts.append([])
                continue
            more = max(most - len(known), 0)
            place = len(row) + len(known)
            context = [*row[-longest:], *known][-longest:]
            guessed = self.stand.draft(context, number, place, more, self.noise)
            drafts.append([*known, *guessed][: max(most, 0)])
        return drafts

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
        best = None
        if self.noise is None and not self.processors:
            best = logits.argmax(-1).tolist()
        picked = []
        for number, own in enumerate(drafts):
            tokens: list[int] = []
            scores = []
            for place in range(len(own) + 1):
                if self.ended[number]:
                    break
                if best is not None:
                    token, score = best[number][place], logits[number, place]
                else:
                    token, score = self._pick(number, place, logits)
                tokens.append(token)
                scores.append(score)
                if place < len(own) and own[place] != token:
                    break
            if scores:
                self._learn(number, tokens, torch.stack(scores))
            picked.append(tokens)
        return picked

    def _pick(self, number: int, place: int, logits: Tensor) -> tuple[int, Tensor]:
        end = len(self.rows[number]) + place
        prefix = self.ids[number : number + 1, :end]
        scores = logits[number : number + 1, place].to(torch.float32, copy=True)
        for processor in self.processors:
            if len(self.rows) == 1 or isinstance(processor, OF_ANY_ROW):
                scores = processor(prefix, scores)
            else:
                scores = processor(self._in_place(prefix), self._in_place(scores))[[number]]
        if self.noise is None:
            return int(scores.argmax(-1)), scores[0]
        row = torch.tensor([number], device=scores.device)
        return int(self.noise.draw(scores, row, end)), scores[0]

    def _in_place(self, row: Tensor) -> Tensor:
        """A row [1, n] at each number [B, n], for what tells rows apart by their numbers."""
        return row.repeat(len(self.rows), 1)

    def _learn(self, number: int, tokens: list[int], scores: Tensor) -> None:
        probs, ids = scores.float().softmax(-1).topk(min(self.stand.table.top, scores.shape[-1]))
        context = self.rows[number][-self.stand.table.orders[0] :]
        known = len(self.ahead[number])  # learnt when they were checked first
        for place, (each, p) in enumerate(zip(ids.tolist(), probs.tolist(), strict=True)):
            if place >= known:
                self.stand.table.learn([*context, *tokens[:place]], each, p)

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
