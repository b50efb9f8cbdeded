"""LazyEviction: lagged eviction by recurrence intervals (arXiv 2506.15969).

Tokens often become important again after a pause, so eviction waits. The rule: (1) a step hits a
token if the token's probability reaches alpha; (2) each token has a note of its last hit and of its
longest interval between two hits; (3) every W steps, with more than B tokens, all tokens but the
newest W get a score, which is high if the current pause is within the token's longest interval and
if the token recurs often; (4) the best B - W and the newest W stay; (5) new tokens keep their true
positions. This reduces memory and reads to at most max(B, prompt) + W tokens per layer and costs
one bit per token and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcomp.cache.layer import LayerCache
from kvcomp.methods.alike import logistic
from kvcomp.methods.eviction import (
    EXAMPLE_ALPHA,
    EXAMPLE_BUDGET,
    RecurrenceEviction,
)
from kvcomp.methods.fields import short_name

if TYPE_CHECKING:
    from typing_extensions import Self

# alpha, and W per task, from the released scripts. They do not say which of the two windows of
# Llama-8B belongs to GSM8K and which to AIME; the order here is inferred.
PUBLISHED: dict[str, tuple[float, dict[str, int]]] = {
    "DeepSeek-R1-Distill-Qwen-7B": (1e-4, {"gsm8k": 101, "math500": 175, "aime": 363}),
    "DeepSeek-R1-Distill-Llama-8B": (5e-4, {"gsm8k": 27, "math500": 52, "aime": 95}),
    "Qwen3-4B": (1e-4, {}),
    "QwQ-32B": (1e-4, {}),
}
FORMS = ("patient", "paper", "code")
EPSILON = 1e-5  # the released code adds it to avoid a division by 0


@dataclass(frozen=True)
class LazyEviction(RecurrenceEviction, name="lazy-eviction"):
    """Lagged eviction. Published with unit="query_head"; "kv_head" stores K and V once per KV head.

    Attributes:
        budget: B, tokens that a unit keeps after an eviction, the newest W among them.
        window: W, steps between evictions, and newest tokens that always stay.
        alpha: probability at which a token counts as hit, under any head of its unit; None:
            1 / budget. Far below that every step hits all tokens, and the oldest leave.
        unit: "kv_head", "query_head" (Hq / Hkv times the bytes) or "layer".
        h1: the first term of the score, which compares the current pause s with the longest
            interval i: 2 sigmoid(-s / i) as in the "paper"; 2 sigmoid(-1 - s / i) as in the
            released "code", which doubles the weight of the second term, roughly; or "patient",
            2 sigmoid(-s / max(i, budget / 4)), with which the second term is multiplied, so that
            it fades as well. In running text most tokens are seen too briefly for a long interval.
        keep_prompt: never evict the prompt; not in the paper.
        sinks: number of first tokens of a sequence that always stay; not in the paper.
    """

    window: int = 128  # W
    h1: str = "patient"
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of(FORMS, "h1")
        most = self.budget - self.window
        expected = f"0 to budget - window = {most}"
        self._require(0 <= self.sinks <= most, "sinks", expected)

    @classmethod
    def published(cls, model: Any, task: str, **fields: Any) -> Self:
        """An instance with the published alpha, window and h1 for a task, such as "aime", and a
        model, given as such or by name ("DeepSeek-R1-Distill-Qwen-7B").

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
        return cls(**{"alpha": alpha, "window": windows[task], "h1": "paper", **fields})

    @classmethod
    def for_model(cls, model: Any, **fields: Any) -> Self:
        """An instance with the published alpha of a model, given as such or by name, if there is
        one. Choose the window for your task. Raises TypeError for other arguments."""
        alpha, _ = PUBLISHED.get(short_name(cls, model), (cls.alpha, {}))
        return cls(**{"alpha": alpha, **fields})

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """At most `budget` tokens at any time, a quarter of them for the window. alpha is high and
        h1 the paper's, as suits the bundled reasoner, which looks facts up after long pauses."""
        budget = EXAMPLE_BUDGET if budget is None else budget
        window = budget // 4
        return cls(budget=budget - window, window=window, alpha=EXAMPLE_ALPHA, h1="paper")

    @property
    def num_recent(self) -> int:
        return self.window

    def score(self, layer: LayerCache) -> Tensor:
        """[B, U, max_len], see `worth`."""
        interval = layer.slots["longest"][..., : layer.max_len]
        silence = layer.cache.steps - layer.slots["last_hit"][..., : layer.max_len]
        return self.worth(silence, interval, layer.positions(interval.shape[1]))

    def worth(self, silence: Tensor, interval: Tensor, positions: Tensor) -> Tensor:
        """The score of tokens [B, U, N], in fp32: +inf for sinks."""
        within, recurs = self.within(silence, interval), self.recurs(interval)
        scores = within * (1 + recurs) if self.h1 == "patient" else within + recurs
        return scores.float().masked_fill(positions < self.sinks, float("inf"))

    def within(self, silence: Tensor, interval: Tensor) -> Tensor:
        """H1 falls as the pause outgrows the interval; about 0 for a token that was never hit."""
        if self.h1 == "patient":
            judged = interval.double().clamp(min=self.budget / 4)
            return 2 * logistic(-silence / judged) * interval.clamp(max=1)
        if self.h1 == "paper":
            return 2 * logistic(-silence / interval.double().clamp(min=EPSILON))
        return 2 * logistic(-1 - silence / (interval.double() + EPSILON))

    def recurs(self, interval: Tensor) -> Tensor:
        """H2 is 1 for a token hit at every step, and 0 for a token that was never hit."""
        return 2 * logistic(1 - interval.clamp(min=1)) * interval.clamp(max=1)
