"""LouisKV: clustered KV retrieval at semantic boundaries (arXiv 2510.11292).

The important tokens hardly change until the queries turn. The rule: (1) the prompt's keys are
clustered per KV head; a cluster is a unit, and its mean key is its digest; (2) a segment of the
output ends when the mean cosine between a step's queries and the previous ones falls below tau, and
becomes a unit too; (3) only then a row selects: units are ranked by a softmax over the digests per
query head, averaged over the group, and the best are taken up to B tokens; (4) units that are not
on the device come from the host; (5) attention is exact over sinks, retrieved and local tokens.
This reduces device memory to S + B + W + s_max tokens and one digest per unit, and copies about
rate * missing * B rows per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcomp.methods.clustered import ClusteredRetrieval
from kvcomp.methods.fields import short_name

if TYPE_CHECKING:
    from typing_extensions import Self

PUBLISHED = {"Qwen3-8B": 0.7}  # tau
CALIBRATED_RATE = 0.1  # retrievals per step and layer, the target of `calibrate`


@dataclass(frozen=True)
class LouisKV(ClusteredRetrieval, name="louis-kv"):
    """Clustered retrieval from host memory whenever the queries turn.

    Attributes:
        tau: a segment ends and the row selects again when a step's queries are less similar to the
            previous ones than this. 2 means every step; -1 means only the first step, and when too
            many tokens are local. 0.7 is published for Qwen3-8B; `calibrate` finds it for a model.
    """

    @classmethod
    def published(cls, model: Any, **fields: Any) -> Self:
        """An instance with the published tau of a model, given as such or by name ("Qwen3-8B").

        Raises:
            ValueError: none was published for that model; `calibrate` finds one.
            TypeError: `model` is neither a name nor a model.
        """
        if (short := short_name(cls, model)) not in PUBLISHED:
            raise ValueError(
                f"kvcomp.LouisKV: no published tau for {short!r}, only for"
                f" {', '.join(PUBLISHED)}; LouisKV.calibrate(model, prompts) finds it"
            )
        return cls.for_model(model, **fields)

    @classmethod
    def for_model(cls, model: Any, **fields: Any) -> Self:
        """An instance with the published tau of a model, given as such or by name, if there is one.
        Raises TypeError for other arguments."""
        return cls(**{"tau": PUBLISHED.get(short_name(cls, model), cls.tau), **fields})

    @property
    def retrieve_below(self) -> float:
        return self.tau

    @property
    def selection_rate(self) -> float:
        return CALIBRATED_RATE
