"""LazyEviction over an engine's block table: tokens leave a running request, and so do its blocks.

After every step that brings a request to a multiple of W tokens, each KV head keeps its B best
tokens. A layer moves them into the first B slots of the request; new tokens go on to the slots of
their true positions. Heads keep different tokens, but equally many, so the blocks between are free,
and which ones follows from the length alone: the scheduler and the workers need no word between
them. Nothing here knows vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp import LazyEviction, ops
from kvcomp.engines.vllm.step import PlacedLayer, Step

REMEMBERED = 65536  # requests whose prompt length is known; the oldest are forgotten


def last_eviction(processed: int, whole: int, method: LazyEviction) -> int:
    """Tokens that a request had when it was last cut; 0: never.

    Args:
        processed: tokens that it has had so far.
        whole: tokens of its prompt, which is cut in decode steps only.
    """
    cut = processed // method.window * method.window
    return cut if cut > max(whole, method.budget) else 0


class Requests:
    """Of each request, the length of its prompt, and its tokens when it was last cut (0: never).
    The first page of its table names it.

    A request that was preempted is processed anew in pieces. vLLM shows a piece of one token as a
    decode step, so it may cut the request in the middle; the pieces behind it then attend to what
    is left.
    """

    def __init__(self, method: LazyEviction) -> None:
        self.method = method
        self._known: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def note(self, first_pages: Tensor, before: Tensor, lens: Tensor) -> Tensor:
        """These requests [B] have pieces of their prompts in the batch, tokens `before` [B] up to
        `lens` [B]. When they were last cut, [B] int64."""
        cuts = []
        for page, start, length in zip(
            first_pages.tolist(), before.tolist(), lens.tolist(), strict=True
        ):
            whole, cut = self._known.pop(page, (start, 0)) if start else (0, 0)
            cuts.append(self._cut(start, whole, cut))
            self._known[page] = length, cuts[-1]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return torch.tensor(cuts)

    def of(self, first_pages: Tensor, lens: Tensor) -> list[tuple[int, int]]:
        """Prompt and last cut of decode rows that have `lens` tokens [B], the new one included.

        A request whose prompt was never seen begins now.
        """
        found = []
        for page, total in zip(first_pages.tolist(), lens.tolist(), strict=True):
            whole, cut = self._known.setdefault(page, (total - 1, 0))
            found.append((whole, self._cut(total - 1, whole, cut)))
        return found

    def _cut(self, processed: int, whole: int, before: int) -> int:
        return last_eviction(processed, whole, self.method) or before


@dataclass(kw_only=True)
class LazyStep(Step):
    """A batch of decode rows, and what each of them has kept.

    Attributes:
        slots: [B, N] int64, where the tokens that a row attends to lie in the pool, oldest first;
            anything past the end of a row.
        held: [B] int32, how many these are, the newest included.
        first: rows whose prompt has just been processed.
        cut: rows that lose tokens after this step.
    """

    slots: Tensor
    held: Tensor
    first: list[int]
    cut: list[int]

    @classmethod
    def plan(
        cls,
        method: LazyEviction,
        table: Tensor,
        lens: Tensor,
        known: list[tuple[int, int]],
        page: int,
        logits: Tensor,
    ) -> LazyStep:
        """From [B, pages] int32 page ids and lengths [B] int32.

        Args:
            known: the rows' prompt lengths and last cuts (`Requests.of`).
            logits: [B, Hq, at least pages * page] fp32, to be written.
        """
        totals = lens.tolist()
        after = torch.tensor([cut for _, cut in known])
        column = torch.arange(table.shape[1])
        used = (lens.long() + page - 1) // page
        inside = column < used[:, None]
        survivors = column < method.budget // page
        kept = inside & (survivors | (column >= after[:, None] // page))
        count = kept.sum(1)
        order = kept.logical_not().int().argsort(dim=1, stable=True)[:, : int(count.max())]
        ids = table.gather(1, order)
        listed = torch.where(torch.arange(order.shape[1]) < count[:, None], ids, -1)
        held = (lens - (used - count) * page).int()
        whole = [(total, prompt) for total, (prompt, _) in zip(totals, known, strict=True)]
        return cls(
            table=table,
            lens=lens,
            longest=max(totals),
            page_size=page,
            logits=logits[..., : order.shape[1] * page],
            kept=(listed, held),
            slots=(ids.long()[:, :, None] * page + torch.arange(page)).flatten(1),
            held=held,
            first=[row for row, (total, prompt) in enumerate(whole) if total == prompt + 1],
            cut=[
                row
                for row, (total, prompt) in enumerate(whole)
                if total == last_eviction(total, prompt, method)
            ],
        )


class LazyLayer(PlacedLayer):
    """One attention layer whose requests lose tokens.

    Beside each slot of the pool lie the token's last hit and its longest interval, per KV head.
    Steps are counted by the length of the request.
    """

    last_hit: Tensor | None = None  # [slots, Hkv] int32
    longest: Tensor | None = None

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, out: Tensor
    ) -> None:
        assert isinstance(step, LazyStep) and step.logits is not None
        method = self.cache.method
        assert isinstance(method, LazyEviction)
        self.step, self.k, self.v, self.out = step, k, v, out
        ids, held = step.kept or (None, None)
        assert ids is not None and held is not None
        _, lse = self._read(q, scale, held, ids, step.logits)
        if self.last_hit is None or self.longest is None:
            self.last_hit = torch.zeros(k.shape[0] * k.shape[2], k.shape[1], dtype=torch.int32)
            self.longest = torch.zeros_like(self.last_hit)
        self._begin(step, self.last_hit, self.longest)
        self._count(step, lse, method.threshold, self.last_hit, self.longest)
        for row in step.cut:
            self._cut(step, row, method, self.last_hit, self.longest)

    @staticmethod
    def _begin(step: LazyStep, last_hit: Tensor, longest: Tensor) -> None:
        """What was born since the last step: its last hit is the step before."""
        for row in step.first:
            slots = step.slots[row, : int(step.held[row])]
            last_hit[slots], longest[slots] = int(step.lens[row]) - 1, 0
        newest = step.slots.gather(1, step.held.long()[:, None] - 1)[:, 0]
        last_hit[newest] = step.lens[:, None] - 1
        longest[newest] = 0

    def _count(
        self, step: LazyStep, lse: Tensor, threshold: float, last_hit: Tensor, longest: Tensor
    ) -> None:
        """The tokens that this step hit."""
        assert step.logits is not None
        batch, heads = len(lse), self.kv_heads
        words = -(-step.logits.shape[-1] // 32)
        bits = torch.empty(batch, heads, words, dtype=torch.int32)
        ops.attention_hits(step.logits, lse, step.held, bits, threshold)
        hit = (bits[..., None] >> torch.arange(32) & 1).flatten(2)
        row, head, index = hit.nonzero(as_tuple=True)
        place = step.slots[row, index] * heads + head
        now = step.lens[row]
        last, most = last_hit.view(-1), longest.view(-1)
        most[place] = torch.maximum(most[place], now - last[place])
        last[place] = now

    def _cut(
        self, step: LazyStep, row: int, method: LazyEviction, last_hit: Tensor, longest: Tensor
    ) -> None:
        """Keep the best tokens of a row in its first slots, in the order of their age."""
        count, now = int(step.held[row]), int(step.lens[row])
        slots = step.slots[row, :count]
        silence, interval = now - last_hit[slots].T[None], longest[slots].T[None]
        age = torch.arange(count, dtype=torch.int32).expand_as(interval)
        victims = ops.select_victims(
            method.worth(silence, interval, age),
            age,
            step.held[row : row + 1],
            torch.tensor([method.budget], dtype=torch.int32),
            count - method.budget,
            num_recent=method.num_recent,
        )
        stays = torch.ones(interval.shape[1:], dtype=torch.bool)
        stays.scatter_(1, victims[0].long(), False)
        kept = stays.nonzero()[:, 1].view(-1, method.budget)  # [Hkv, B]
        source, goal = slots[kept], slots[: method.budget]
        head = torch.arange(len(kept))[:, None]
        size = step.page_size
        for pool in (self.k, self.v):
            pool[goal // size, head, goal % size] = pool[source // size, head, source % size]
        for state in (last_hit.T, longest.T):
            state[head, goal] = state[head, source]
