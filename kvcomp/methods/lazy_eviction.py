"""LazyEviction: lagged eviction by recurrence intervals (arXiv 2506.15969).

Tokens become important again after a silence, so none is judged in haste. The rule: (1) a token is
hit in a step where its probability reaches alpha; (2) per token, keep the step of the last hit and
the longest interval between two; (3) every W steps, where more than B tokens are there, score all
but the newest W by whether their silence is still within their longest interval, plus whether they
recur often; (4) the best B - W and the newest W stay; (5) new tokens keep their true positions.
Saves memory and reads: at most max(B, prompt) + W tokens a layer; costs a bit per token and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.eviction import (
    EXAMPLE_ALPHA,
    EXAMPLE_BUDGET,
    ObservingEviction,
    RecurrenceEviction,
)
from kvcomp.methods.fields import short_name

if TYPE_CHECKING:
    from typing_extensions import Self

# alpha, and W per task: those of the released scripts. The windows of Llama-8B for GSM8K and AIME
# are named there without their tasks; that order is inferred.
PUBLISHED: dict[str, tuple[float, dict[str, int]]] = {
    "DeepSeek-R1-Distill-Qwen-7B": (1e-4, {"gsm8k": 101, "math500": 175, "aime": 363}),
    "DeepSeek-R1-Distill-Llama-8B": (5e-4, {"gsm8k": 27, "math500": 52, "aime": 95}),
    "Qwen3-4B": (1e-4, {}),
    "QwQ-32B": (1e-4, {}),
}
FORMS = ("paper", "code")
COVERED = 0.8  # share of the tokens whose longest interval the window covers
ALPHAS = (1e-4, 1e-3, 1e-2, 5e-2, 0.1, 0.2, 0.4)  # that `calibrate` tries


@dataclass(frozen=True)
class LazyEviction(RecurrenceEviction, name="lazy-eviction"):
    """Lagged eviction. Published with unit="query_head"; "kv_head" keeps native GQA bytes.

    Attributes:
        budget: B, tokens that a unit keeps after an eviction, the newest W among them.
        window: W, steps between evictions, and newest tokens that always stay.
        alpha: probability at which a token counts as hit, under any head of its unit.
        unit: "kv_head", "query_head" (Hq / Hkv times the bytes) or "layer".
        h1: how "still within its interval" is scored: as the "paper" has it, 2 sigmoid(-s / i) of
            the silence s and the longest interval i, or as the "code" released with it,
            2 sigmoid(-1 - s / i), which lets the second term weigh about twice as much.
        keep_prompt: whether the prompt is exempt; it is not in the paper.
    """

    window: int = 128  # W
    h1: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.h1 not in FORMS:
            raise ValueError(
                f"kvcomp.LazyEviction: h1: expected one of {', '.join(FORMS)}, got {self.h1!r}"
            )

    @classmethod
    def published(cls, model: Any, task: str, **fields: Any) -> Self:
        """alpha and window as published, for a model, itself or by name, and a task
        ("DeepSeek-R1-Distill-Qwen-7B", "aime").

        Raises:
            ValueError: nothing was published for that model or task; `calibrate` finds both.
            TypeError: `model` is neither a name nor a model.
        """
        short = short_name(cls, model)
        if short not in PUBLISHED:
            raise ValueError(
                f"kvcomp.LazyEviction: nothing published for {short!r}, only for"
                f" {', '.join(PUBLISHED)}; LazyEviction.calibrate(model, prompts) measures it"
            )
        alpha, windows = PUBLISHED[short]
        if task not in windows:
            known = f"only for {', '.join(windows)}" if windows else "only its alpha"
            raise ValueError(
                f"kvcomp.LazyEviction: no window published for {short} on {task!r}, {known};"
                " LazyEviction.calibrate(model, prompts) measures it"
            )
        return cls(**{"alpha": alpha, "window": windows[task], **fields})

    @classmethod
    def for_model(cls, model: Any, **fields: Any) -> Self:
        """The published alpha of a model, itself or by name, where there is one; the window must
        fit the task. TypeError where `model` is neither."""
        alpha, _ = PUBLISHED.get(short_name(cls, model), (cls.alpha, {}))
        return cls(**{"alpha": alpha, **fields})

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens at any time, a quarter of them the window; alpha is high, as
        `calibrate` finds it for contexts of hundreds of tokens."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        window = budget // 4
        return cls(budget=budget - window, window=window, alpha=EXAMPLE_ALPHA)

    @property
    def num_recent(self) -> int:
        return self.window

    def score(self, layer: LayerCache) -> Tensor:
        """[B, U, max_len]: still within its interval, plus recurs often."""
        interval = layer.slots["longest"][..., : layer.max_len].float()
        silence = layer.cache.steps - layer.slots["last_hit"][..., : layer.max_len]
        return self.within(silence, interval) + self.recurs(interval)

    def within(self, silence: Tensor, interval: Tensor) -> Tensor:
        """H1: falls as the silence outgrows the interval; about 0 for what was never hit."""
        ratio = silence / interval.clamp(min=1e-5)
        return 2 * torch.sigmoid(-ratio if self.h1 == "paper" else -1 - ratio)

    def recurs(self, interval: Tensor) -> Tensor:
        """H2: 1 for a token hit at every step, 0 for one never hit."""
        return 2 * torch.sigmoid(1 - interval) * interval.clamp(max=1)

    @classmethod
    def calibrate(
        cls,
        model: Any,
        prompts: list,
        *,
        tokenizer: Any = None,
        max_new_tokens: int = 1024,
        alphas: Sequence[float] = ALPHAS,
        **fields: Any,
    ) -> Self:
        """Measure window and alpha on prompts of the user's own.

        The prompts are answered with dense attention. For each alpha the window is the paper's: it
        covers the longest interval of 80 % of the tokens that were hit, but is at most a quarter of
        the budget. For alpha the paper gives no rule; taken is the one with which the model,
        evicting, best predicts the dense answers. Use prompts that are not the test.

        Args:
            model: a Hugging Face causal LM.
            prompts: texts (with `tokenizer`) or lists of token ids.
            max_new_tokens: of each answer; prompt and answer must exceed the budget.
            alphas: to choose from; each costs another pass over the answers.
            fields: the other fields of the result (budget, unit, ...).

        Raises:
            ValueError: no context exceeded the budget, or no token was hit.
        """
        hf = import_module("kvcomp.hf")  # the one reach upwards: methods know no transformers
        recorder = _IntervalRecorder(unit=fields.get("unit", cls.unit), alphas=tuple(alphas))
        answers = hf.decode_all(
            model, prompts, recorder, tokenizer=tokenizer, max_new_tokens=max_new_tokens
        )
        budget = fields.get("budget", cls.budget)
        most = max(1, budget // 4)
        if recorder.longest_row <= budget + most:
            raise ValueError(
                f"kvcomp.LazyEviction.calibrate: no context had more than budget + window ="
                f" {budget + most} tokens, only {recorder.longest_row}; decode more, or choose a"
                " smaller budget"
            )
        losses = {}
        for alpha, window in recorder.windows().items():
            method = cls(**{"alpha": alpha, "window": min(window, most), **fields})
            losses[method] = hf.answer_loss(model, prompts, answers, method, tokenizer=tokenizer)
        return min(losses, key=losses.__getitem__)


@dataclass(frozen=True)
class _IntervalRecorder(ObservingEviction):
    """Dense attention that tracks the longest interval of every token, for several alphas."""

    budget: int = 2**30
    alphas: tuple[float, ...] = ()
    caches: list[list[LayerCache]] = field(default_factory=list)

    def start(self, cache: KVCache) -> None:
        super().start(cache)
        self.caches.append(cache.layers)

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        super().prefill(layer, q)
        for alpha in self.alphas:
            layer.track(f"last_hit {alpha}", self.num_units(layer))
            layer.track(f"longest {alpha}", self.num_units(layer))
        layer.state["tracked"] = torch.zeros_like(layer.logical_lens)

    def observe(self, layer: LayerCache, logits: Tensor, lse: Tensor) -> None:
        born = layer.logical_lens - layer.state["tracked"]
        layer.state["tracked"] = layer.logical_lens.clone()
        words = -(-layer.capacity // 32)
        hits = layer.seq_lens.new_empty(len(lse), 1, self.num_units(layer), words)
        for alpha in self.alphas:
            ops.attention_hits(logits, lse, layer.seq_lens, hits[:, 0], alpha)
            last_hit, longest = layer.slots[f"last_hit {alpha}"], layer.slots[f"longest {alpha}"]
            step = layer.cache.steps + 1
            ops.recurrence_update(hits, last_hit, longest, layer.seq_lens, born, step)

    @property
    def longest_row(self) -> int:
        return max(layer.max_len for layers in self.caches for layer in layers)

    def windows(self) -> dict[float, int]:
        """By alpha, the steps that cover the longest interval of most tokens that were hit."""
        found = {}
        for alpha in self.alphas:
            intervals = torch.cat(
                [
                    layer.slots[f"longest {alpha}"].flatten()
                    for layers in self.caches
                    for layer in layers
                    if layer.slots
                ]
            )
            intervals = intervals[intervals > 0].sort().values
            if len(intervals):
                found[alpha] = int(intervals[int(COVERED * (len(intervals) - 1))])
        if not found:
            raise ValueError("kvcomp.LazyEviction.calibrate: no token was hit by any alpha")
        return found
