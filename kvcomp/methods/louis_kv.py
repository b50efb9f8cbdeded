"""LouisKV: clustered KV retrieval at semantic boundaries (arXiv 2510.11292).

The tokens that matter hardly change until the queries turn. The rule: (1) the prompt's keys are
clustered per KV head; a cluster is a unit with its mean key as digest; (2) the output is cut into
segments, the other units, where the mean cosine between a step's queries and the previous ones
falls below tau; (3) only there all units compete: softmax over the digests per query head, mean
over the group, best units until B tokens; (4) units that are not on the device come from the host;
(5) attention is exact over sinks, retrieved and local tokens. Reduces device memory (S + B + W +
s_max tokens and one digest per unit stay) and copies about rate * missing * B rows per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcomp.methods.clustered import ClusteredRetrieval

if TYPE_CHECKING:
    pass

CALIBRATED_RATE = 0.1  # retrievals per step and layer that `calibrate` aims at


@dataclass(frozen=True)
class LouisKV(ClusteredRetrieval, name="louis-kv"):
    """Clustered retrieval from host memory, when the queries turn.

    Attributes:
        tau: similarity of a step's queries to the previous ones, below which a segment ends and the
            row selects again: 2 means every step, -1 only the first step and when too many tokens
            are local. 0.7 is published for Qwen3-8B; `calibrate` finds it for a model.
    """

    @property
    def retrieve_below(self) -> float:
        return self.tau

    @property
    def selection_rate(self) -> float:
        return CALIBRATED_RATE
