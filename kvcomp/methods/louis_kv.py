"""LouisKV: clustered KV retrieval at semantic boundaries (arXiv 2510.11292).

What a step attends to hardly changes until its queries turn. The rule: (1) the prompt's keys are
clustered per KV head, a cluster being a unit with its mean key as digest; (2) the output is cut
into segments, the other units, where the mean cosine of a step's queries to those of the step
before falls below tau; (3) there, and only there, all units compete: softmax over the digests per
query head, mean over the group, best units until B tokens; (4) what is not resident comes from the
host; (5) attention is exact over sinks, retrieved and local tokens. Saves device memory (S + B + W
+ s_max tokens and a digest per unit stay) and the link: about rate * missing * B rows per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.methods.base import Method
from kvcomp.methods.clustered import ClusteredRetrieval

if TYPE_CHECKING:
    from typing_extensions import Self

CALIBRATED_RATE = 0.1  # retrievals per step and layer that `calibrate` aims at


@dataclass(frozen=True)
class LouisKV(ClusteredRetrieval, name="louis-kv"):
    """Clustered retrieval from host memory, when the queries turn.

    Attributes:
        tau: similarity of a step's queries to those before, below which a segment ends and the row
            selects anew: 2 is every step, -1 only the first and when too many tokens are local.
            0.7 is published for Qwen3-8B; `calibrate` finds it for a model.
    """

    @property
    def retrieve_below(self) -> float:
        return self.tau

    @property
    def selection_rate(self) -> float:
        return CALIBRATED_RATE

    @classmethod
    def calibrate(
        cls,
        model: Any,
        prompts: list,
        *,
        tokenizer: Any = None,
        rate: float = CALIBRATED_RATE,
        max_new_tokens: int = 1024,
        **fields: Any,
    ) -> Self:
        """Find tau for a model: that below which the similarity is in a share `rate` of the steps.

        The prompts are answered with dense attention; what is recorded is the similarity of every
        step and layer that would retrieve.

        Args:
            model: a Hugging Face causal LM.
            prompts: texts (with `tokenizer`) or lists of token ids.
            rate: retrievals wanted, per step and layer, 0 to 1.
            max_new_tokens: of each answer.
            fields: the other fields of the result (budget, local, ...).

        Raises:
            ValueError: a rate outside [0, 1], or answers too short to compare two steps.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"kvcomp.LouisKV.calibrate: rate: expected 0 to 1, got {rate}")
        recorder = _SimilarityRecorder(fields.get("dense_layers", cls.dense_layers))
        decode = import_module("kvcomp.hf").decode_all  # the one reach upwards
        decode(model, prompts, recorder, tokenizer=tokenizer, max_new_tokens=max_new_tokens)
        seen = torch.cat(
            [torch.stack(steps).flatten() for steps in recorder.seen if steps] or [torch.zeros(0)]
        )
        seen = seen[seen.isfinite()]
        if not len(seen):
            raise ValueError(
                "kvcomp.LouisKV.calibrate: no two decode steps to compare; decode more tokens"
            )
        tau = seen.kthvalue(1 + round(rate * (len(seen) - 1))).values  # quantile() wants few
        return cls(**{"tau": round(tau.item(), 4), **fields})


@dataclass(frozen=True)
class _SimilarityRecorder(Method):
    """Dense attention that records the similarity of successive queries."""

    dense_layers: int
    seen: list[list[Tensor]] = field(default_factory=list)  # per cache, [B] of each step and layer

    def start(self, cache: KVCache) -> None:
        self.seen.append([])
        cache.state.queries = [None] * len(cache.layers)
        cache.state.seen = self.seen[-1]

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        state, place = layer.cache.state, layer.position
        if place >= self.dense_layers:
            if state.queries[place] is None:
                state.queries[place] = torch.zeros_like(q, memory_format=torch.contiguous_format)
            state.seen.append(ops.query_similarity(q, state.queries[place]).cpu())
        return layer.attend(q, scale)[0]
