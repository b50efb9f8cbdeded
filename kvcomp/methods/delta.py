"""DELTA: dynamic layer-aware sparse attention (arXiv 2510.09883).

A few layers read the whole cache. The others read the pages that the nearest such layer below them
found important. The rule: (1) warm-up layers attend densely; (2) a delta layer attends densely and
scores each page: it takes the largest probability of each token over all query heads and sums over
the page; (3) the newest L pages and the best K - L others form one set for all heads; (4) the
layers up to the next delta layer attend to that set; (5) every step selects again. This reduces
attention reads by up to (layers / dense layers) times. It does not reduce memory, because the whole
KV stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.view import Cache, Layer
from kvcomp.checks import require
from kvcomp.methods.base import Method
from kvcomp.methods.cost import Place, StepBytes
from kvcomp.methods.depth import default_warmup
from kvcomp.methods.fields import short_name

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvcomp.cache.layer import LayerCache

# Published delta layers, with layers 0 and 1 as warm-up. The 7B and 1.5B sets come from the
# released scripts and the 14B set from the paper. None was published for other models.
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (2, 14, 22),
    "DeepSeek-R1-Distill-Qwen-7B": (2, 14, 22),
    "DeepSeek-R1-Distill-Qwen-14B": (2, 6, 42),
}
PUBLISHED_FIELDS = {"page_size": 16, "sinks": 0, "warmup": 2}
SELECTS = ("query", "step")


@dataclass(frozen=True)
class Delta(Method, name="delta"):
    """Layer-aware sparse attention. Layer numbers count the layers that the method manages.

    Attributes:
        budget: k = K * P, tokens that a sparse layer attends to, recent and first pages included.
        page_size: P, tokens per page; 16 in the paper.
        recent: L, newest pages, always in the set; a partial page counts.
        warmup: W0, number of first layers that attend densely; None: those below the first of
            `delta_layers`, or without these 2, as published, but at most a quarter of the layers.
        delta_layers: D, the layers that select; None: the layer after the warm-up, and those at 1/2
            and 4/5 of the depth, like the published sets.
        sinks: first pages, always in the set; 0 in the paper.
        select: how drafts that are checked together select. "query": each by itself, as its decode
            step would. "step": the first one for all of them, which is one selection less for each
            and lags behind by as many tokens as are accepted. Not in the paper.
        group: torch.distributed group whose ranks hold the other heads of the same layers (tensor
            parallelism); probabilities are then reduced over it.
    """

    budget: int = 1024
    page_size: int = 8  # P
    recent: int = 8  # L
    warmup: int | None = None  # W0
    delta_layers: tuple[int, ...] | None = None  # D
    sinks: int = 1
    select: str = field(default="query", repr=False)
    group: Any = field(default=None, repr=False, compare=False)

    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.page_size >= 1, "page_size", "at least 1 token")
        self._require(self.recent >= 1, "recent", "at least 1 page")
        self._require((self.warmup or 0) >= 0, "warmup", "at least 0 layers")
        require(
            self.group is None or isinstance(self.group, dist.ProcessGroup),
            "kvcomp.Delta: group",
            "a torch.distributed process group or None",
            self.group,
            TypeError,
        )
        whole = self.budget % self.page_size == 0
        self._require(whole, "budget", f"a multiple of page_size={self.page_size}")
        self._require(self.select in SELECTS, "select", f"one of {', '.join(SELECTS)}")
        self._require(self.sinks >= 0, "sinks", "at least 0 pages")
        forced = "(recent + sinks)" if self.sinks else "recent"
        least = (self.recent + self.sinks) * self.page_size
        expected = f"at least {forced} * page_size = {least} tokens"
        self._require(self.budget >= least, "budget", expected)

    @property
    def num_pages(self) -> int:
        """K, pages in the set."""
        return self.budget // self.page_size

    @classmethod
    def published(cls, model: Any, **fields: Any) -> Self:
        """An instance with the published delta layers of a model, given as such or by name
        ("DeepSeek-R1-Distill-Qwen-7B"), and the paper's pages of 16 tokens, the first not kept.

        Raises:
            ValueError: no set was published for that model; `calibrate` finds one.
            TypeError: `model` is neither a name nor a model.
        """
        if (short := short_name(cls, model)) not in PUBLISHED:
            raise ValueError(
                f"kvcomp.Delta: no published delta layers for {short!r}, only for"
                f" {', '.join(PUBLISHED)}; Delta.calibrate(model, prompts) finds them"
            )
        return cls.for_model(model, **{**PUBLISHED_FIELDS, **fields})

    @classmethod
    def for_model(cls, model: Any, **fields: Any) -> Self:
        """An instance with the published delta layers of a model, given as such or by name, or with
        layers at the same depths if none were published. Raises TypeError for other arguments."""
        return cls(**{"delta_layers": PUBLISHED.get(short_name(cls, model)), **fields})

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """Pages of 4, at most two recent ones, and one delta layer, for short contexts and few
        layers."""
        budget = 128 if budget is None else budget
        return cls(budget=budget, page_size=4, recent=2 if budget >= 12 else 1, delta_layers=(2,))

    def check(self, num_layers: int) -> None:
        first = self.warmup or 0
        if first >= num_layers:
            raise ValueError(
                f"kvcomp.Delta: warmup={first} needs more layers than the {num_layers} of this"
                " model"
            )
        outside = [x for x in self.delta_layers or () if not first <= x < num_layers]
        above = f"warmup={first}" if first else "0"
        self._require(not outside, "delta_layers", f"layers from {above} up to {num_layers - 1}")
        warmup = self.num_warmup(num_layers)
        if self.delta_layers is not None and warmup not in self.delta_layers:
            raise ValueError(
                f"kvcomp.Delta: delta_layers: the first must follow the {warmup} warm-up"
                f" layers directly, or the layers between have no pages; got {self.delta_layers}"
            )

    def num_warmup(self, num_layers: int) -> int:
        """W0 in a model of `num_layers` layers. Where only some layers attend to everything, they
        are few, and the first of them is not the model's first."""
        if self.warmup is not None:
            return self.warmup
        return min(self.delta_layers) if self.delta_layers else default_warmup(num_layers)

    def plan(self, num_layers: int) -> tuple[int, ...]:
        """The delta layers in a model of `num_layers` layers."""
        if self.delta_layers is not None:
            return tuple(sorted(self.delta_layers))
        places = [self.num_warmup(num_layers)]
        for share in (0.5, 0.8):
            place = int(num_layers * share)
            if places[-1] + 2 <= place < num_layers - 1:  # a sparse layer below and above
                places.append(place)
        return tuple(places)

    def roles(self, num_layers: int) -> tuple[frozenset[int], frozenset[int]]:
        """The layers that attend densely, and the layers among them that select pages."""
        delta_layers = self.plan(num_layers)
        dense = frozenset((*range(self.num_warmup(num_layers)), *delta_layers))
        # A delta layer selects if a sparse one comes next.
        planners = (x for x in delta_layers if x + 1 not in dense and x + 1 < num_layers)
        return dense, frozenset(planners)

    @property
    def dense_up_to(self) -> float:
        return self.budget

    def step_bytes(self, at: Place) -> StepBytes:
        if at.seen <= self.budget:
            return super().step_bytes(at)
        dense, planners = self.roles(at.layers)
        sparse = at.layers - len(dense)
        selected = self.budget - -at.seen % self.page_size  # the last page may be partial
        return StepBytes(
            read=(len(dense) * at.seen + sparse * selected) * at.token_bytes,
            held=at.seen * at.layers * at.token_bytes,
            scoring=len(planners) * at.seen * at.logit_bytes + sparse * 4 * self.num_pages,
        )

    def start(self, cache: Cache) -> None:
        cache.state.dense, cache.state.planners = self.roles(len(cache.layers))
        for layer in cache.layers:
            layer.shared_sets = layer.position not in cache.state.dense
        cache.state.pages = None  # (page_ids [B, 1, K], selected_lens [B]) of this step

    def attend(self, layer: Layer, q: Tensor, scale: float) -> Tensor:
        state = layer.cache.state
        if layer.max_len <= self.budget:  # nothing to leave out in any row
            return layer.attend(q, scale)[0]
        if layer.position not in state.dense:
            page_ids, lens = (x.to(q.device) for x in state.pages)  # layers may be spread
            return layer.attend(
                q, scale, page_ids=page_ids, page_size=self.page_size, seq_lens=lens
            )[0]
        if layer.position not in state.planners:
            return layer.attend(q, scale)[0]
        logits = layer.cache.logits_for(layer, q)
        chosen: dict[str, Any] = {
            "num_pages": self.num_pages,
            "num_recent": self.recent,
            "num_sink": self.sinks,
        }
        if self.group is None and layer.sinks is None:
            out, _, _, *state.pages = layer.attend_and_select(
                q, scale, logits=logits, page_size=self.page_size, **chosen
            )
            return out
        out, lse = layer.attend(q, scale, logits=logits)
        scores = self.score(logits[:, :, : layer.max_len], lse, layer.seq_lens)
        state.pages = ops.select_pages(scores, layer.seq_lens, self.page_size, **chosen)
        return out

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        state = layer.cache.state
        if layer.max_len + layer.staged <= self.budget:
            return super().verify(layer, q, scale)
        if layer.position not in state.dense:
            return self._verify_sparse(layer, q, scale)
        if layer.position not in state.planners:
            return super().verify(layer, q, scale)
        logits = layer.cache.staged_logits_for(layer, q)
        out, lse = layer.attend_staged(q, scale, logits=logits)
        choosing = layer.staged if self.select == "query" else 1
        lens = layer.staged_lens()[:, :choosing].flatten().contiguous()
        scores = self.score(
            logits[:, :choosing, :, : layer.max_len + layer.staged].flatten(0, 1),
            lse[:, :choosing].flatten(0, 1).contiguous(),
            lens,
        )
        sets = ops.select_pages(
            scores,
            lens,
            self.page_size,
            num_pages=self.num_pages,
            num_recent=self.recent,
            num_sink=self.sinks,
        )
        state.pages = [x.unflatten(0, (-1, choosing)) for x in sets]  # [B, m, ...]
        return out

    def _verify_sparse(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        page_ids, lens = (x.to(q.device) for x in layer.cache.state.pages)
        if self.select == "query":
            return layer.attend_apart(q, scale, page_ids, lens, page_size=self.page_size)
        page_ids, lens = self._with_drafts(layer, page_ids[:, 0], lens[:, 0])
        return layer.attend_staged(
            q, scale, page_ids=page_ids, page_size=self.page_size, seq_lens=lens
        )[0]

    def _with_drafts(self, layer: LayerCache, ids: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """The pages [B, 1, K] that the first draft has chosen, and those of the others behind
        them."""
        more = layer.staged - 1
        pages = -(-more // self.page_size)
        used = (-(-lens // self.page_size)).long()[:, None]  # of `ids`, the last the first draft's
        step = torch.arange(1, pages + 1, device=ids.device)
        last = (layer.seq_lens[:, None] + step * self.page_size).clamp(
            max=layer.max_len + layer.staged - 1
        )
        wide = torch.nn.functional.pad(ids[:, 0], (0, pages))
        wide.scatter_(1, used - 1 + step, (last // self.page_size).int())
        return wide[:, None], lens + more

    def end_step(self, cache: Cache) -> None:
        cache.state.pages = None

    def end_verify(self, cache: Cache) -> None:
        cache.state.pages = None

    def score(self, logits: Tensor, lse: Tensor, seq_lens: Tensor) -> Tensor:
        """Page scores [B, 1, pages], reduced over all ranks of `group` if there is one."""
        if self.group is None:
            return ops.page_scores(logits, lse, seq_lens, self.page_size)
        tokens = ops.page_scores(logits, lse, seq_lens, 1)  # the max over this rank's heads
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=self.group)
        tokens = torch.nn.functional.pad(tokens, (0, -tokens.shape[-1] % self.page_size))
        return tokens.unflatten(-1, (-1, self.page_size)).sum(-1)
