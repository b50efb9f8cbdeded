"""The loop of `Stand`: draft, check all drafts in one forward, keep those that are right."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.prefill import TYPES
from kvcomp.ops.linear_rows import MAX_ROWS
from kvcomp.thinking.drafts import Draft
from kvcomp.thinking.draws import Drawn, Draws
from kvcomp.thinking.pace import Pace

if TYPE_CHECKING:
    from kvcomp.thinking.stand import Stand


LEAD = 2.0  # tokens by which a row that is so far ahead counts 1 / e of one that is not


class Decoding:
    """One call of `generate`.

    Args:
        ids: [B, n] prompts.
        processors, stopping, config: what `generate` hands to a `custom_generate`.
    """

    def __init__(
        self, stand: Stand, model: Any, ids: Tensor, processors: Any, stopping: Any, config: Any
    ) -> None:
        self.drafter, self.table = stand.drafter, stand.table
        self.model, self.stopping, self.config = model, stopping, config
        noise = stand.noise if config.do_sample else None
        self.draws = Draws(processors, noise, len(ids), stand.table.top)
        self.prompt, self.most = ids.shape[1], config.max_length
        room = max(self.most - self.prompt, 1) + stand.drafter.depth + 1
        self.ids = torch.nn.functional.pad(ids, (0, room))  # a row's tokens, then a path of drafts
        self.rows = ids.tolist()
        self.ahead: list[list[int]] = [[] for _ in self.rows]  # checked, while others catch up
        self.ended = [False] * len(self.rows)
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad)
        self.pace = Pace(len(self.rows)) if stand.adapt else None
        self.known = [0] * len(self.rows)  # tokens of each that the table has seen
        self.together = stand.together
        # Tokens of a forward. On a CPU as many as give the bits of one by one, see `linear_rows`.
        self.widest = 2**31
        if ids.device.type == "cpu" and len(ids) <= MAX_ROWS:
            self.widest = MAX_ROWS

    def run(self, cache: Any, streamer: Any, model_kwargs: dict) -> None:
        seen = int(cache.get_seq_length())
        inputs = self.model.prepare_inputs_for_generation(
            self.ids[:, : self.prompt],
            next_sequence_length=self.prompt - seen if seen else None,
            is_first_iteration=True,
            **model_kwargs,
        )
        last = _last_positions(self.model, inputs)
        continued = seen or self.config.return_dict_in_generate  # by a cache without gaps
        together = continued if self.together is None else self.together
        self.apart = not (
            together
            or last is None
            or len(self.rows) == 1
            or isinstance(cache, ChunkedCache)
            or cache.kv.method.in_step
            or not cache.all_managed
            or not TYPES.isdisjoint(inspect.signature(self.model.forward).parameters)
        )
        logits = self.model(**inputs, return_dict=True).logits[:, -1:]
        # Positions behind a row's tokens; None: the model finds them by itself.
        self.offset: Tensor | None = None
        if isinstance(cache, Cache) and last is not None:
            self.offset = last + 1 - cache.kv.layers[0].logical_lens[:, None].to(last.device)
        self.table.read(self.rows[0])  # copies of one prompt, or one of several
        self.known = [self.prompt] * len(self.rows)
        if len(self.rows) == 1 or not self.rests:
            self.table.catch_up()
        mask = model_kwargs.get("attention_mask")
        nothing = [Draft() for _ in self.rows]
        picked = self._picked(logits.flatten(0, 1), range(len(self.rows)), nothing)
        self._look(picked, [1] * len(picked))
        self._take(picked, streamer)
        while not all(self.ended):
            if not self.rests:
                self._tell()
                self.table.catch_up()
            began, active = time.perf_counter(), self.ended.count(False)
            drafts, expected = self._drafts(cache)
            total, widest = sum(map(len, drafts)), max(map(len, drafts))
            tokens = active + total if self.apart else len(drafts) * (1 + widest)
            logits, first = self._forward(cache, drafts, mask)
            picked = self._picked(logits, first, drafts)
            # None of a row that has ended.
            counts = [len(each) + (n in self.waiting) for n, each in enumerate(picked)]
            if not self.apart:
                going = zip(counts, self.ended, strict=True)
                counts = [min(n for n, ended in going if not ended)] * len(counts)
            self._commit(cache, counts)
            looked = time.perf_counter()
            self._look(picked, counts)
            began += time.perf_counter() - looked
            self.ahead = [each[n:] for each, n in zip(picked, counts, strict=True)]
            new = [each[:n] for each, n in zip(picked, counts, strict=True)]
            gained = self._gained(new)
            self._take(new, streamer)
            if self.pace is not None:
                right = sum(map(len, new)) - active
                seconds = time.perf_counter() - began
                self.pace.note(tokens, seconds, total, expected, right, gained)
        self._tell()  # for further samples of the question

    @property
    def rests(self) -> bool:
        """Whether nothing is looked up or learnt for the next forward."""
        return self.pace is not None and self.pace.rests

    def _tell(self) -> None:
        """Let the table read what was decoded at rest."""
        for number, row in enumerate(self.rows):
            if self.known[number] < len(row):
                self.table.read(row, self.known[number])
                self.known[number] = len(row)

    def _drafts(self, cache: Any) -> tuple[list[Draft], float]:
        """Of each row, behind its newest token; and how many of all to expect to be right."""
        if self.rests and not any(self.ahead):
            return [Draft() for _ in self.rows], 0.0
        longest = self.table.orders[0]
        left = [self.most - len(row) for row in self.rows]
        most = max(int(min(self.drafter.depth, cache.room - 1, max(left) - 1)), 0)
        if not self.apart:
            most = min(most, self.widest // len(self.rows) - 1)
        drafts = [Draft() for _ in self.rows]
        numbers = [number for number, ended in enumerate(self.ended) if not ended]
        rows = [(n, len(self.rows[n]), self.rows[n][-longest:]) for n in numbers]
        ahead = [self.ahead[number] for number in numbers]
        if self.rests:
            most = min(most, max(map(len, ahead)))
        found = self.drafter.draft(rows, ahead, most, self.draws.noise)
        if self.draws.looking:
            found = [self._up_to_a_look(*each) for each in zip(numbers, found, strict=True)]
        counts = self._apart(numbers, found) if self.apart else self._alike(found, ahead)
        for number, draft, count in zip(numbers, found, counts, strict=True):
            drafts[number] = draft.cut(count)
        if self.apart:
            return drafts, sum(sum(draft.chances) for draft in drafts)
        columns = zip(*(drafts[number].chances for number in numbers), strict=False)
        return drafts, sum(len(column) * math.prod(column) for column in columns)

    def _gained(self, new: list[list[int]]) -> float:
        """Tokens by which new ones bring the batch on: by the soft minimum of its lengths, as the
        last row ends it."""
        going = [(len(self.rows[n]), len(new[n])) for n, over in enumerate(self.ended) if not over]
        behind = min(length for length, _ in going)
        before = sum(math.exp((behind - length) / LEAD) for length, _ in going)
        after = sum(math.exp((behind - length - more) / LEAD) for length, more in going)
        return LEAD * math.log(before / after)

    def _apart(self, numbers: list[int], found: list[Draft]) -> list[int]:
        """Drafts of each row, where each takes its own. What is won for a row that is behind counts
        more, since the last one ends the batch."""
        behind = min(len(self.rows[number]) for number in numbers)
        weights = [math.exp((behind - len(self.rows[n])) / LEAD) for n in numbers]
        values = [
            (weight * chance, place)
            for place, (draft, weight) in enumerate(zip(found, weights, strict=True))
            for chance in draft.chances
        ]
        values.sort(key=lambda each: -each[0])  # stable: the first drafts of a row stay before
        count = min(len(values), self.widest - len(numbers))
        if self.pace is not None:
            hopes = [value for value, _ in values[:count]]
            count = self.pace.drafts(len(numbers), sum(weights), hopes)
        chosen = [place for _, place in values[:count]]
        return [chosen.count(place) for place in range(len(found))]

    def _alike(self, found: list[Draft], ahead: list[list[int]]) -> list[int]:
        """As many drafts for each row, which all take or none."""
        columns = list(zip_longest(*(draft.chances for draft in found), fillvalue=0.0))
        count, rows = len(columns), len(self.rows)
        if self.pace is not None:
            hopes = [len(column) * math.prod(column) for column in columns]
            count = self.pace.drafts(rows, len(found), hopes, each=rows)
            count = max(count, *map(len, ahead))
        return [count] * len(found)

    def _forward(
        self, cache: Any, drafts: list[Draft], mask: Tensor | None
    ) -> tuple[Tensor, Sequence[int]]:
        """Logits [N, V] behind all newest tokens and their drafts, and the first of each row."""
        device, width = self.ids.device, 1 + max(map(len, drafts))
        table = [
            [row[-1], *draft.tokens, *[self.pad] * (width - 1 - len(draft))]
            for row, draft in zip(self.rows, drafts, strict=True)
        ]
        ids = torch.tensor(table, device=device)
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
        if not self.staged or not self.apart:
            if self.staged:
                cache.stage()
            logits = self.model(input_ids=ids, **given).logits
            return logits.flatten(0, 1), range(0, len(ids) * width, width)
        # Rows have drafts of their own number: all in one, so that there is no padding.
        lengths = [
            0 if ended else 1 + len(draft) for draft, ended in zip(drafts, self.ended, strict=True)
        ]
        cache.stage(lengths)
        own = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
        given["position_ids"] = given["position_ids"][own][None]
        logits = self.model(input_ids=ids[own][None], **given).logits[0]
        return logits, list(accumulate(lengths, initial=0))

    def _commit(self, cache: Any, counts: list[int]) -> None:
        if self.staged:
            cache.commit(torch.tensor(counts) if self.apart else counts[0])

    def _up_to_a_look(self, number: int, draft: Draft) -> Draft:
        """A draft that ends where a processor looks into the cache, which holds no more then."""
        for count in range(len(draft)):
            if self.draws.looks(self._prefix(number, draft.tokens[:count])):
                return draft.cut(count)
        return draft

    def _look(self, picked: list[list[int]], counts: list[int]) -> None:
        """Pick the tokens that waited until the cache holds those before them."""
        told = not self.rests
        for number, logits in self.waiting.items():
            path = picked[number]
            if counts[number] == len(path) + 1:
                found = self.draws.behind(logits, number, self._prefix(number, path), told)
                if told:
                    context = self.rows[number][-self.table.orders[0] :]
                    self.table.learn([*context, *path], found.ids, found.probs)
                path.append(found.token)

    def _picked(self, logits: Tensor, first: Sequence[int], drafts: list[Draft]) -> list[list[int]]:
        """Of each row, the drafts that are right and the token behind them, unless it is `waiting`.
        Arguments as `_forward` returns them."""
        self.waiting: dict[int, Tensor] = {}  # of rows: the logits [1, V] of their last node
        picked: list[list[int]] = [[] for _ in drafts]
        told = not self.rests
        drawn = self._drawn(logits, first, drafts, told)
        for number, (row, draft) in enumerate(zip(self.rows, drafts, strict=True)):
            node: int | None = None if self.ended[number] else 0
            while node is not None:
                if drawn is None:
                    prefix = self._prefix(number, picked[number])
                    own = logits[first[number] + node][None]
                    if node == len(draft) and self.draws.looks(prefix):
                        self.waiting[number] = own
                        break
                    found = self.draws.behind(own, number, prefix, told)
                else:
                    found = drawn[number][node]
                if told and len(picked[number]) >= len(self.ahead[number]):  # else it knows
                    context = row[-self.table.orders[0] :]
                    self.table.learn([*context, *picked[number]], found.ids, found.probs)
                picked[number].append(found.token)
                node = self.drafter.trust.note(draft, node, found.token)
        return picked

    def _drawn(
        self, logits: Tensor, first: Sequence[int], drafts: list[Draft], told: bool
    ) -> list[list[Drawn]] | None:
        """Behind each node of each row; None: that needs the tokens before it."""
        lengths = {len(row) for row in self.rows}
        if not self.draws.at_once:
            alike = not (any(self.ended) or any(drafts)) and len(lengths) == 1
            if told or not alike or self.draws.looking:
                return None
            every = self.draws.behind_all(logits, self.ids[:, : lengths.pop()])
            return [[each] for each in every]
        nodes = [
            (first[number] + node, number, len(self.rows[number]) + node)
            for number, draft in enumerate(drafts)
            if not self.ended[number]
            for node in range(1 + len(draft))
        ]
        chosen, numbers, ends = torch.tensor(nodes, device=logits.device).unbind(1)
        if len(nodes) < len(logits):
            logits = logits[chosen]
        flat = iter(self.draws.all(logits, numbers, ends, told))
        return [
            [] if ended else [next(flat) for _ in range(1 + len(draft))]
            for draft, ended in zip(drafts, self.ended, strict=True)
        ]

    def _prefix(self, number: int, path: list[int]) -> Tensor:
        """The ids of a row and of a path behind it: [1, n]."""
        end = len(self.rows[number])
        if path:
            new = torch.tensor(path, device=self.ids.device)
            self.ids[number, end : end + len(path)] = new
        return self.ids[number : number + 1, : end + len(path)]

    def _take(self, new: list[list[int]], streamer: Any) -> None:
        """Tokens of each row are true, up to where it ends."""
        told, lengths = not self.rests, {len(row) for row in self.rows}
        alike = len(lengths) == 1 and all(len(tokens) == 1 for tokens in new)
        if alike:  # as `generate` does it
            end = lengths.pop()
            self.ids[:, end] = torch.tensor(new, device=self.ids.device)[:, 0]
            ends = self.stopping(self.ids[:, : end + 1], None).tolist()
        for number, tokens in enumerate(new):
            row = self.rows[number]
            for token in tokens:
                if self.ended[number]:
                    break
                row.append(token)
                if alike:
                    self.ended[number] = ends[number]
                else:
                    self.ids[number, len(row) - 1] = token
                    self.ended[number] = self._ends(number)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
            if told:
                self.known[number] = len(row)

    def _ends(self, number: int) -> bool:
        """Whether a row ends with its newest token."""
        prefix = self.ids[number : number + 1, : len(self.rows[number])]
        return bool(self.stopping(prefix.repeat(len(self.rows), 1), None)[number])

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
