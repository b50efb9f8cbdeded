"""PerTokenRetrieval: LouisKV without its trigger; it selects units at every step.

Clusters, segments, scores and kernels are the same; only the moments of retrieval differ. So a
difference in link bytes and time is the gain of the trigger, and a difference in accuracy its cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.methods.clustered import ClusteredRetrieval


@dataclass(frozen=True)
class PerTokenRetrieval(ClusteredRetrieval, name="per-token-retrieval", baseline=True):
    """Clustered retrieval at every step."""
