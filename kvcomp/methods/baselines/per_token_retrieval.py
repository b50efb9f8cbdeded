"""PerTokenRetrieval: LouisKV's units, selected anew at every step; what its trigger must beat.

Clusters, segments, scores and kernels are the same; only the moment of retrieval differs, so that a
difference in link bytes and time is the trigger's own merit, and a difference in accuracy its cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.methods.clustered import ClusteredRetrieval


@dataclass(frozen=True)
class PerTokenRetrieval(ClusteredRetrieval, name="per-token-retrieval", baseline=True):
    """Clustered retrieval at every step."""
