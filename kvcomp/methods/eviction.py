"""The base of all eviction methods: when tokens leave, how many leave, and which must stay.

A method scores tokens (`score`). Every `window` steps the tokens with the lowest scores are removed
in place until `budget` are left, so a layer keeps at most budget + window tokens. Keys stay rotated
for their true positions. A *unit* is a group of heads that keep the same set of tokens; all units
of a row keep the same number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.base import Method, definer
from kvcomp.methods.cost import Place, StepBytes
from kvcomp.ops.recurrence_update import MAX_STEPS

if TYPE_CHECKING:
    from typing_extensions import Self

UNITS = ("kv_head", "query_head", "layer")
EXAMPLE_BUDGET, EXAMPLE_WINDOW, EXAMPLE_ALPHA = 128, 16, 0.2


@dataclass(frozen=True)
class Eviction(Method):
    """Evicts the tokens with the lowest `score`, which subclasses define.

    Attributes:
        budget: B, tokens that a unit keeps after an eviction.
        window: W, decode steps between evictions; 1 evicts at every step.
        unit: heads that share a set of tokens: each "kv_head"; each "query_head", for which K and V
            are stored once per query head (Hq / Hkv times the bytes); or the whole "layer".
        keep_prompt: never evict the first prompt, however long it is; the budget is then at least
            the prompt plus the newest tokens that must stay.
    """

    budget: int = 1024  # B
    window: int = 1  # W
    unit: str = "kv_head"
    keep_prompt: bool = False

    croppable: ClassVar[bool] = False
    one_way: ClassVar[str] = "it has evicted others for them"
    in_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of(UNITS, "unit")
        self._require(self.window >= 1, "window", "at least 1 step")
        self._require(
            self.budget > self.num_recent,
            "budget",
            f"more than the {self.num_recent} newest tokens, which always stay",
        )

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens at any time, including the window."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        window = min(EXAMPLE_WINDOW, budget // 4)
        return cls(budget=budget - window, window=window)

    @property
    def num_recent(self) -> int:
        """Newest tokens that stay whatever their score."""
        return 0

    def score(self, layer: LayerCache) -> Tensor:
        """The score of each kept token: [B, U, max_len] fp32, +inf for tokens that must stay."""
        raise NotImplementedError

    def num_units(self, layer: LayerCache) -> int:
        """U, which is 1 or the number of heads in the slab."""
        return 1 if self.unit == "layer" else layer.kv_heads

    def start(self, cache: KVCache) -> None:
        cache.state.prompt = 0  # tokens of the longest first prompt
        cache.state.decoding = False  # until the first step, what comes in is the first prompt
        cache.state.filled = [0] * len(cache.layers)  # longest row when a prompt last came in
        for layer in cache.layers:
            layer.limit(self.budget, self.window)

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        state = layer.cache.state
        state.filled[layer.position] = layer.max_len
        if self.unit == "query_head" and "prompt_lens" not in layer.state:
            layer.repeat_heads(q.shape[1])
        if not state.decoding:
            lens, state.prompt = layer.logical_lens.clone(), layer.columns
            if state.prompts is not None:
                lens = state.prompts[layer.position]
                state.prompt = int(lens.max())
            layer.state["prompt_lens"] = lens
            layer.limit(self.most_kept(layer.cache), self.window)

    def prompts(self, cache: KVCache) -> list[Tensor] | None:
        if not cache.state.decoding:
            return cache.state.prompts
        return [layer.state["prompt_lens"] for layer in cache.layers]

    def most_kept(self, cache: KVCache) -> int:
        """Tokens that the longest row keeps after an eviction."""
        if self.keep_prompt:
            return max(self.budget, cache.state.prompt + self.num_recent)
        return self.budget

    def step_bytes(self, at: Place) -> StepBytes:
        kept = max(self.budget, at.prompt + self.num_recent) if self.keep_prompt else self.budget
        attended = min(at.seen, kept + (self.window + 1) / 2)  # from one eviction to the next
        if at.seen <= at.prompt + self.window:  # there was none yet
            attended = at.seen
        row_bytes = at.layers * at.token_bytes * self._copies(at)
        most = min(at.seen, max(kept, at.prompt) + self.window)
        return StepBytes(read=attended * row_bytes, held=most * row_bytes)

    def _copies(self, at: Place) -> int:
        """Copies of K and V per KV head; more than 1 if each query head keeps its own tokens."""
        return at.heads // at.kv_heads if self.unit == "query_head" else 1

    def kept_lens(self, layer: LayerCache) -> Tensor:
        """[B] int32: tokens that each row keeps after an eviction."""
        if self.keep_prompt:
            return (layer.state["prompt_lens"] + self.num_recent).clamp(min=self.budget)
        return torch.full_like(layer.seq_lens, self.budget)

    def room(self, cache: KVCache) -> float:
        """The number of tokens up to the next eviction, which follows the last accepted one."""
        return self.window - cache.steps % self.window

    @property
    def drafts_refused(self) -> str | None:
        if self.window == 1:
            return "it evicts at every step (window=1), so that each token sees another cache"
        return super().drafts_refused

    def between_steps(self, cache: KVCache) -> None:
        cache.state.decoding = True
        for layer, filled in zip(cache.layers, cache.state.filled, strict=True):
            bound = max(self.most_kept(cache), filled) + self.window
            assert layer.max_len <= bound, f"{layer.max_len} tokens kept, over the bound of {bound}"
        if cache.steps % self.window == 0:
            for layer in cache.layers:
                self.evict(layer)

    def evict(self, layer: LayerCache) -> None:
        """Cut `layer` down to the budget, in every row that exceeds it."""
        if layer.columns <= self.budget:
            return
        positions = layer.positions(self.num_units(layer))
        scores = self.score(layer)
        if self.keep_prompt:
            prompt = positions < layer.state["prompt_lens"][:, None, None]
            scores = scores.masked_fill(prompt, torch.inf)
        kept_lens = self.kept_lens(layer)
        victims = ops.select_victims(
            scores,
            positions,
            layer.seq_lens,
            kept_lens,
            layer.max_len - self.budget,
            num_recent=self.num_recent,
        )
        layer.evict(victims, kept_lens, self.budget, self.most_kept(layer.cache))


@dataclass(frozen=True)
class ObservingEviction(Eviction):
    """Evicts by attention: `observe` gets the logits of every decode step."""

    def step_bytes(self, at: Place) -> StepBytes:
        step = super().step_bytes(at)
        tokens = step.read / (at.token_bytes * self._copies(at))
        return replace(step, scoring=tokens * at.logit_bytes)

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        logits = layer.cache.logits_for(layer, q)
        out, lse = layer.attend(q, scale, logits=logits)
        self.observe(layer, logits, lse)
        return out

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        logits = layer.cache.staged_logits_for(layer, q)
        out, lse = layer.attend_staged(q, scale, logits=logits)
        lens = layer.staged_lens()
        notes = self.measure(layer, logits.flatten(0, 1), lse.flatten(0, 1), lens.flatten())
        layer.drafts["notes"] = notes.unflatten(0, lens.shape)
        return out

    def accept(self, layer: LayerCache, index: int) -> None:
        self.record(layer, layer.drafts["notes"][:, index])

    @property
    def drafts_refused(self) -> str | None:
        if not issubclass(definer(type(self), "measure"), definer(type(self), "observe")):
            return "it does not say what it observes of a draft (measure, record)"
        return super().drafts_refused

    def observe(self, layer: LayerCache, logits: Tensor, lse: Tensor) -> None:
        """Called after a layer has attended: logits [B, Hq, capacity], valid up to seq_lens, and
        lse [B, Hq]."""
        self.record(layer, self.measure(layer, logits, lse, layer.seq_lens))

    def measure(self, layer: LayerCache, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        """The note [R, ...] on R queries. This changes nothing.

        Args:
            logits: [R, Hq, capacity], valid up to lens [R], for one step (R = B) or for drafts.
            lse: [R, Hq].
        """
        raise NotImplementedError

    def record(self, layer: LayerCache, note: Tensor) -> None:
        """Store the note [B, ...] on the step of the newest token."""
        raise NotImplementedError

    def probabilities(self, layer: LayerCache, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        """[R, U, tokens]: probabilities summed over a unit's heads; 0 past the end of a row."""
        logits, units = logits[:, :, : layer.max_len + layer.staged], self.num_units(layer)
        return ops.page_scores(logits, lse, lens, 1, num_groups=units, reduction="sum")


@dataclass(frozen=True)
class RecurrenceEviction(ObservingEviction):
    """Evicts by the times of hits, which it keeps in `slots["last_hit"]` and `slots["longest"]`.

    A token is hit when its probability reaches alpha under any head of the unit. A step records one
    bit per token. Every 32 steps, and before an eviction, these bits update the int32 notes.

    Attributes:
        alpha: probability at which a token counts as hit; None: 1 / budget, the probability of each
            kept token if all had the same.
    """

    alpha: float | None = None

    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.threshold < 1, "alpha", "a probability between 0 and 1")

    @property
    def threshold(self) -> float:
        """The probability at which a token counts as hit."""
        return 1 / self.budget if self.alpha is None else self.alpha

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        state, steps = layer.cache.state, layer.cache.steps
        if "last_hit" not in layer.slots:
            units, words = self.num_units(layer), -(-layer.capacity // 32)
            layer.track("last_hit", units)
            layer.track("longest", units)
            hits = layer.seq_lens.new_zeros(len(layer.seq_lens), MAX_STEPS, units, words)
            layer.remember("hits", hits)
            layer.state["replayed"] = torch.zeros_like(layer.logical_lens)
            if layer.position == 0:
                state.ring = layer.cache.ring(MAX_STEPS)  # of `hits`
        elif steps > state.replayed:  # what was seen before these tokens came
            self._replay(layer, layer.added)
        self._hits(layer)
        if layer.position == len(layer.cache.layers) - 1:
            self._begin_anew(layer.cache)

    def observe(self, layer: LayerCache, logits: Tensor, lse: Tensor) -> None:
        hits, ring = self._hits(layer), layer.cache.state.ring
        ops.attention_hits(logits, lse, layer.seq_lens, hits, self.threshold, row=ring.row)

    def measure(self, layer: LayerCache, logits: Tensor, lse: Tensor, lens: Tensor) -> Tensor:
        """[R, U, words] bits of hits."""
        bits = lens.new_empty(len(lens), self.num_units(layer), -(-layer.capacity // 32))
        ops.attention_hits(logits, lse, lens, bits, self.threshold)
        return bits

    def record(self, layer: LayerCache, note: Tensor) -> None:
        self._hits(layer)[:, layer.cache.state.ring.row] = note

    def end_step(self, cache: KVCache) -> None:
        cache.state.ring.advance()

    def between_steps(self, cache: KVCache) -> None:
        pending = cache.steps - cache.state.replayed
        if pending == MAX_STEPS or cache.steps % self.window == 0:
            for layer in cache.layers:
                self._replay(layer)
            self._begin_anew(cache)
        super().between_steps(cache)

    def _hits(self, layer: LayerCache) -> Tensor:
        """[B, 32, U, words]: a bit for every slot. It grows and shrinks with the slab."""
        hits, words = layer.state["hits"], -(-layer.capacity // 32)
        if hits.shape[3] != words:
            padded = torch.nn.functional.pad(hits, (0, words - hits.shape[3]))
            hits = layer.remember("hits", padded)
        return hits

    def _replay(self, layer: LayerCache, unseen: int | Tensor = 0) -> None:
        """Update `slots` to the last step, which came before the `unseen` newest tokens."""
        steps, replayed = layer.cache.steps, layer.cache.state.replayed
        logical_lens = layer.logical_lens - unseen
        ops.recurrence_update(
            self._hits(layer)[:, : steps - replayed],
            layer.slots["last_hit"],
            layer.slots["longest"],
            layer.seq_lens - unseen,
            logical_lens - layer.state["replayed"],
            replayed + 1,
        )
        layer.state["replayed"] = logical_lens

    def _begin_anew(self, cache: KVCache) -> None:
        """Start a new recording: no bits wait to be replayed."""
        cache.state.replayed = cache.steps  # up to which `slots` know them
        cache.state.ring.restart()
