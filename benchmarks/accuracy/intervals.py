"""95 % intervals of shares: of answers by Wilson, of means over problems by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z = 1.959964  # of the normal distribution, 95 % on both sides
RESAMPLES = 2000


def wilson(right: int, total: int) -> tuple[float, float]:
    """Of a share of independent answers (Wilson 1927): never empty, never outside 0..1."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, Z * Z / total
    middle = share + spread / 2
    half = Z * sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(low, 0.0) if right else 0.0, min(high, 1.0) if right < total else 1.0


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean of one value per problem: problems are drawn anew, the same way in every run."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)
